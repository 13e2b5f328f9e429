"""Flow-GRPO's scripts, as they are and with the diffs of docs/flow-grpo.md, on small models.

The loops of sampling and training are taken out of ``main`` of a script and run with stand-ins for what surrounds them:
prompts, text encoders, rewards, accelerate and wandb. Log-probabilities, losses and denoising loops are the script's.
"""

from __future__ import annotations

import ast
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tools.clients import guide
from tools.clients.interface import Finding
from tools.clients.loading import prepare
from tools.clients.small_models import MODELS

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
PIPELINES = "flow_grpo/diffusers_patch"
SCRIPTS = {
    "train_sd3": ("sd3", "sd3_pipeline_with_logprob", {}),
    "train_sd3_fast": ("sd3", "sd3_pipeline_with_logprob_fast", {"sde_window_size": 2}),
    "train_sd3_fast, cps": ("sd3", "sd3_pipeline_with_logprob_fast", {"sde_window_size": 3, "sde_type": "cps"}),
    "train_flux": ("flux", "flux_pipeline_with_logprob", {}),
    "train_flux_fast": ("flux", "flux_pipeline_with_logprob_fast", {"sde_window_size": 2}),
    "train_sd3_GRPO_Guard": ("sd3", "sd3_pipeline_with_logprob", {"rationorm": True}),
    "train_qwenimage": ("qwen", "qwenimage_pipeline_with_logprob", {"sde_window_size": 2}),
}


def check(folder: Path) -> Iterator[Finding]:
    """Runs every script without changes, with the fused loss, with weights, and with a wrong sampler."""
    prepare(folder, "flow_grpo")
    for name, (family, pipeline, options) in SCRIPTS.items():
        script = Script(folder, name.split(",")[0], family, pipeline, options)
        own, fused, star = (script.run(mode) for mode in ("own", "fused", "star"))
        shared = {key for log in own["logs"] for key, value in log.items() if isinstance(value, Tensor)}
        missing = shared - fused["logs"][0].keys()
        yield Finding(f"{name}: its metrics", not missing, ", ".join(sorted(missing)))
        for kind in ("loss", "policy_loss", "kl_loss", "approx_kl", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"):
            if kind in shared and kind not in missing:
                yield _near(f"{name}: {kind} of two updates", *([log[kind] for log in r["logs"]] for r in (fused, own)))
        yield _near(f"{name}: gradients of two updates", fused["gradients"], own["gradients"])
        clipped = [float(log["clipfrac"]) for log in own["logs"]]
        yield Finding(f"{name}: the second update clips some samples", 0 < clipped[-1] < 1, f"{clipped[-1]:.2f}")
        ratio = float(star["logs"][0]["ratio_mean"])
        yield Finding(f"{name}: with weights, the first ratio is 1", abs(ratio - 1) < 1e-5, f"{ratio - 1:.1e} off")
        steps = {key: tuple(star["samples"][key].shape[:2]) for key in ("weights", "latents")}
        yield Finding(f"{name}: with weights, for the same steps", len(set(steps.values())) == 1, f"{steps}")
        change = _distance(star["gradients"], fused["gradients"])
        yield Finding(f"{name}: with weights, another gradient", 0.01 < change < 10, f"{change:.2f}")
        try:
            script.run("star", trained={"noise_level": 0.5})
            yield Finding(f"{name}: another noise level is an error", False)
        except ValueError as error:
            yield Finding(f"{name}: another noise level is an error", "mean square" in str(error))


def _near(name: str, found: list[Tensor], expected: list[Tensor]) -> Finding:
    distance = _distance(found, expected)
    return Finding(name, distance <= TOLERANCE, f"{distance:.1e}")


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The error relative to the norm of all values; values of 1e-6 count as zero."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-6)) if a.shape == b.shape else math.inf


class Script:
    """The loops of a script."""

    def __init__(self, folder: Path, name: str, family: str, pipeline: str, options: dict[str, Any]) -> None:
        self.folder, self.family, self.options = folder, family, options
        self.files = {"script": f"scripts/{name}.py", "pipeline": f"{PIPELINES}/{pipeline}.py"}
        self.edits = guide.diffs(ROOT / "docs" / "flow-grpo.md")

    def text(self, kind: str, mode: str) -> str:
        text = (self.folder / self.files[kind]).read_text()
        if self.family == "qwen":  # the guide removes an argument that the transformer does not have
            text = "".join(line for line in text.splitlines(True) if "txt_seq_lens=txt_seq_lens" not in line)
        return text if mode == "own" else guide.apply(text, self.edits[self.files[kind]], star=mode == "star")

    def run(self, mode: str, trained: dict[str, Any] | None = None) -> dict[str, Any]:
        """A rollout and two updates; ``trained`` are settings that differ in training."""
        torch.manual_seed(0)
        random.seed(0)
        world = World(self.family, self.options)
        source = ast.parse(self.text("script", mode))
        module = ModuleType("flow_grpo.diffusers_patch.checked")
        module.__package__ = "flow_grpo.diffusers_patch"
        sys.modules[module.__name__] = module
        exec(compile(self.text("pipeline", mode), self.files["pipeline"], "exec"), vars(module))
        scope = world.scope | {"pipeline_with_logprob": module.pipeline_with_logprob}
        for node in source.body:  # the functions of the step and the loss
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("star_kernels", f"{PIPELINES}.sd3_sde".replace("/", "."))
            ):
                _run(node, self.files["script"], scope)
            if isinstance(node, ast.FunctionDef) and node.name == "compute_log_prob":
                _run(node, self.files["script"], scope)
        (main,) = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        loops = [node for node in ast.walk(main) if isinstance(node, ast.For)]
        (sampling,) = (loop for loop in loops if "config.sample.num_batches_per_epoch" in ast.unparse(loop.iter))
        (training,) = (loop for loop in loops if "samples_batched" in ast.unparse(loop.iter))
        _run(sampling, self.files["script"], scope)
        samples = world.batch(scope)
        vars(scope["config"].sample).update(trained or {})
        scope["samples_batched"] = [samples]
        for _ in range(2):
            _run(training, self.files["script"], scope)
        return {"logs": world.logs, "gradients": world.gradients, "samples": samples}


def _run(node: ast.stmt, file: str, scope: dict[str, Any]) -> None:
    exec(compile(ast.Module([node], []), file, "exec"), scope)


class Trained(nn.Module):
    """The wrapper of a distributed model, with the adapter's reference model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        start = [parameter.detach().clone() for parameter in module.parameters()]

        @contextmanager
        def disable_adapter() -> Iterator[None]:
            trained = [parameter.data for parameter in module.parameters()]
            for parameter, value in zip(module.parameters(), start, strict=True):
                parameter.data = value
            yield
            for parameter, value in zip(module.parameters(), trained, strict=True):
                parameter.data = value

        vars(module)["disable_adapter"] = disable_adapter
        self.reference = disable_adapter

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)


class Optimizer:
    """Gradient descent; keeps the gradients of every step."""

    def __init__(self, parameters: list[Tensor], steps: Any, kept: list[Tensor], rate: float) -> None:
        self.parameters, self.steps, self.kept, self.rate = parameters, steps, kept, rate

    def step(self) -> None:
        if self.steps():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self.kept.append(parameter.grad.clone())
                    norm = parameter.grad.norm().clamp(min=1e-12)
                    parameter.data -= self.rate * parameter.norm() / norm * parameter.grad

    def zero_grad(self) -> None:
        if self.steps():
            for parameter in self.parameters:
                parameter.grad = None


class Accelerator:
    """The parts of accelerate that the scripts use: one process, gradients accumulated over the steps of a batch."""

    device = torch.device("cpu")
    is_local_main_process = is_main_process = True

    def __init__(self, accumulated: int) -> None:
        self.accumulated, self.calls = accumulated, 0

    @contextmanager
    def accumulate(self, _: Any) -> Iterator[None]:
        self.calls += 1
        yield

    @property
    def sync_gradients(self) -> bool:
        return self.calls % self.accumulated == 0

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulated).backward()

    def clip_grad_norm_(self, *_: Any) -> None: ...

    def reduce(self, info: Any, **_: Any) -> Any:
        return info


class World:
    """What surrounds the loops of a script: the names of its ``main``."""

    def __init__(self, family: str, options: dict[str, Any]) -> None:
        self.family = family
        model = MODELS[family]()
        steps, self.prompts = 5, model.prompts
        batch = len(self.prompts)
        options = {"sde_window_size": 0, **options}
        self.trained = options["sde_window_size"] or (steps - 1)
        self.logs: list[dict[str, Any]] = []
        self.gradients: list[Tensor] = []
        accelerator = Accelerator(self.trained)
        pipeline, transformer = model.pipeline, Trained(model.pipeline.transformer)
        kinds = {"train_batch_size": batch, "num_batches_per_epoch": 1, "same_latent": False, "num_steps": steps}
        kinds |= {"guidance_scale": 2.0, "noise_level": 0.7, "sde_window_range": (0, 4), "sde_type": "sde", **options}
        train = {"cfg": True, "beta": 0.04, "adv_clip_max": 5, "clip_range": model.clip_range, "max_grad_norm": 1.0}
        accumulated = self.trained
        self.scope: dict[str, Any] = {
            **{"torch": torch, "defaultdict": defaultdict, "random": random, "tqdm": lambda items, **_: items},
            **{"pipeline": pipeline, "transformer": transformer, "accelerator": accelerator, "autocast": nullcontext},
            **{
                "epoch": 0,
                "inner_epoch": 0,
                "global_step": 0,
                "samples": [],
                "info": defaultdict(list),
                "ema": None,
                "print": lambda *_: None,
            },
            **{"rank": 0, "local_rank": 0, "world_size": 1, "is_distributed": False, "device": accelerator.device},
            **{"text_encoders": [], "num_train_timesteps": self.trained, "gradient_accumulation_steps": accumulated},
            "config": SimpleNamespace(
                resolution=model.resolution,
                rationorm=options.get("rationorm", False),
                per_prompt_stat_tracking=False,
                sample=SimpleNamespace(**kinds),
                train=SimpleNamespace(**train, ema=False),
            ),
            "optimizer": Optimizer(
                [p for p in transformer.parameters() if p.requires_grad],
                (lambda: True) if family == "qwen" else lambda: accelerator.sync_gradients,
                self.gradients,
                model.rate,
            ),
            "transformer_ref": _Reference(transformer),
            "transformer_trainable_parameters": [],
            "wandb": SimpleNamespace(log=lambda log, step: self.logs.append(log)),
            "time": SimpleNamespace(sleep=lambda _: None),
            "executor": SimpleNamespace(submit=lambda *_, **__: None),
            "reward_fn": None,
            "train_sampler": SimpleNamespace(set_epoch=lambda _: None),
            "train_iter": iter([(self.prompts, [{}] * batch)] * 9),
            "tokenizers": [_Tokenizer()],
            "compute_text_embeddings": lambda *_, **__: model.embeddings(1),
            **model.names,
        }

    def batch(self, scope: dict[str, Any]) -> dict[str, Tensor]:
        """The samples with advantages, as the scripts make them between sampling and training."""
        (samples,) = scope["samples"]
        samples = {key: value for key, value in samples.items() if isinstance(value, Tensor) and key != "prompt_ids"}
        advantages = torch.tensor([1.3, -0.8, -0.5, 0.7])[: len(self.prompts)].double()
        return samples | {"advantages": advantages[:, None].repeat(1, self.trained)}


class _Tokenizer:
    def __call__(self, prompts: list[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), 8, dtype=torch.long))


class _Reference(nn.Module):
    """The reference model of a script that keeps two."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        vars(self)["trained"] = trained

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with self.trained.reference():
            return self.trained(*arguments, **options)
