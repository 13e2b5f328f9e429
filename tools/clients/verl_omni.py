"""VeRL-Omni's real code against star_kernels.integrations.verl_omni, on a CPU.

Needs the packages of the checkout that its losses and engines use: ``pip install --no-deps verl tensordict`` and theirs
(codetiming, hydra-core, orjson, pyvers); Ray, vLLM and others are replaced by stubs if they are not installed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from star_kernels import TokenSelection
from star_kernels.integrations.means import SAMPLERS
from star_kernels.integrations.verl_omni import ALGORITHMS, register
from tools.clients import verl_omni_example, verl_omni_tests
from tools.clients.interface import Finding, compare
from tools.clients.loading import prepare
from tools.clients.verl_omni_interface import INTERFACE, MASK_METRICS, METRICS, NFT_METRICS
from tools.clients.verl_omni_world import (
    ADAPTERS,
    BATCH,
    OPTIONAL,
    WHOLE,
    Adapter,
    Model,
    Outcome,
    World,
    loss_function,
    make_engine,
    model_config,
    nft_batch,
)

UNIFORM = 5e-6  # relative error of loss and gradient with weights of one: float32 sums in another order
MODES = ("flow_grpo", "dance_grpo", "grpo_guard", "flow_dppo")


def check(folder: Path) -> Iterator[Finding]:
    """Findings of signatures, numbers and VeRL-Omni's own tests."""
    yield from compare(folder, INTERFACE)
    stubs = prepare(folder, "verl_omni", whole=WHOLE, optional=OPTIONAL)
    print(f"stubs: {', '.join(stubs) or 'none'}")
    importlib.import_module(ALGORITHMS)
    worlds = {(a.folder, sde_type): World(a, sde_type) for a in ADAPTERS for sde_type in SAMPLERS}
    cases = [(key, mode) for key in worlds for mode in MODES]
    theirs = {(key, mode): worlds[key].update(mode) for key, mode in cases}
    nft = Nft()
    nft_theirs = nft.update()
    for key, mode in cases:
        yield from _case(" ".join((*key, mode)), worlds[key], mode, theirs[key, mode])
    yield from _nft(nft, nft_theirs)
    yield from _maps()
    yield from verl_omni_example.check(folder)
    yield from verl_omni_tests.check(folder)


def _case(name: str, world: World, mode: str, theirs: Outcome) -> Iterator[Finding]:
    shape = world.adapter.shape
    locations = shape[:1] if len(shape) == 2 else shape[1:]  # packed, or channels first
    ones = torch.ones(BATCH, len(world.adapter.steps), *locations)
    varied = 2 * torch.rand(ones.shape, generator=torch.Generator().manual_seed(2))
    varied = varied / varied.flatten(2).mean(dim=2).view(BATCH, -1, *[1] * len(locations))
    register()
    metrics = METRICS if mode != "flow_dppo" else MASK_METRICS
    yield _same(f"{name}: without weights, bitwise", theirs, world.update(mode), metrics)
    yield _near(f"{name}: weights of one", theirs, _weighted(world, mode, ones))
    changed = _weighted(world, mode, varied)
    yield Finding(f"{name}: weights change the gradient", _error(changed.gradient, theirs.gradient) > 1e-2)
    still = _weighted(world, mode, varied, change=0.0).metrics
    furthest = max(abs(still[f"actor/{kind}"] - 1) for kind in ("ratio_mean", "ratio_max"))
    yield Finding(f"{name}: ratio of an unchanged model", furthest < 1e-6, f"{furthest:.1e} from 1")
    for other in SAMPLERS:
        if other != world.sde_type:
            register(sde_type=other)
            expected = f"got '{other}'.*they are those of '{world.sde_type}'"
            yield _raises(f"{name}: sampler {other}", expected, lambda: _weighted(world, mode, varied))


def _weighted(world: World, mode: str, weights: Tensor, **options: Any) -> Outcome:
    return world.update(mode, star_weights=weights, **options)


class Nft:
    """A micro-batch of DiffusionNFT with VeRL-Omni's engine for it."""

    def __init__(self) -> None:
        adapter = Adapter("qwen_image_diffusion_nft", "QwenImagePipeline", "diffusion_nft", (16, 64))
        importlib.import_module(f"verl_omni.pipelines.{adapter.folder}.diffusers_training_adapter")
        self.model, self.batch = Model(adapter.shape), nft_batch(adapter.shape)
        self.engine = make_engine("NFTDiffusersFSDPEngine", self.model, model_config(adapter, "sde"))
        made = type(self.engine)
        made.use_adapter = lambda engine, name: _Changed(self.model, 0.0)
        made.disable_adapter = lambda engine: _Changed(self.model, 0.01)
        made._set_adapter = lambda engine, name: None

    def update(self, **extra: Tensor) -> Outcome:
        with torch.no_grad():
            self.model.change.copy_(0.05 * torch.randn(16, 64, generator=torch.Generator().manual_seed(1)))
        batch = self.batch.clone(recurse=False)
        batch.update(extra)
        self.model.zero_grad()
        total, metrics = torch.zeros(()), {}
        for step in range(2):
            loss, output = self.engine.forward_step(batch, loss_function("diffusion_nft"), False, step)
            loss.backward()
            total, metrics = total + loss.detach(), output["metrics"]
        assert self.model.change.grad is not None
        found = {name: float(value.aggregate()) for name, value in metrics.items()}
        return Outcome(total, self.model.change.grad.clone(), found)


class _Changed:
    """Context in which the trained number has another value."""

    def __init__(self, model: Model, value: float) -> None:
        self.model, self.value = model, value

    def __enter__(self) -> None:
        self.before = self.model.change.data
        self.model.change.data = torch.full_like(self.before, self.value)

    def __exit__(self, *_: object) -> None:
        self.model.change.data = self.before


def _nft(nft: Nft, theirs: Outcome) -> Iterator[Finding]:
    register()
    yield _same("diffusion_nft: without weights, bitwise", theirs, nft.update(), NFT_METRICS)
    weights = torch.ones(BATCH, 2, 16)
    yield _near("diffusion_nft: weights of one", theirs, nft.update(star_weights=weights))
    weights[:, :, :8] = 2
    weights[:, :, 8:] = 0
    changed = nft.update(star_weights=weights)
    yield Finding("diffusion_nft: weights change the gradient", _error(changed.gradient, theirs.gradient) > 1e-2)
    without = changed.gradient[8:].abs().max()  # the gradient of the KL penalty, which weights do not change
    passed = bool(without < changed.gradient.abs().max() / 10)
    yield Finding("diffusion_nft: positions of weight 0 have no gradient of the policy loss", passed)


def _small_models() -> Iterator[tuple[Adapter, Any]]:
    """Adapters with a model of diffusers."""
    torch.manual_seed(0)
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    yield ADAPTERS[0], sd3
    qwen = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    yield ADAPTERS[1], qwen


def _maps() -> Iterator[Finding]:
    """Maps of diffusers' models in VeRL-Omni's engine, with gradient checkpointing and guidance."""
    for adapter, model in _small_models():
        world = World(adapter, "cps")
        model.enable_gradient_checkpointing()
        world.engine.module = model
        selection = TokenSelection.from_positions([[2]] * BATCH)
        register(select=partial(_constant, selection))
        world.batch = world.rollout()
        loss, output = world.engine.forward_step(world.batch, loss_function("flow_grpo"), False, 1)
        loss.backward()
        ratio = float(output["metrics"]["actor/ratio_mean"].aggregate())
        trained = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        name = f"{adapter.folder}: maps of {type(model).__name__}"
        yield Finding(name, trained and abs(ratio - 1) < 1e-6)


def _constant(selection: TokenSelection, micro_batch: Any) -> TokenSelection:
    return selection


def _same(name: str, theirs: Outcome, ours: Outcome, metrics: tuple[str, ...]) -> Finding:
    same = torch.equal(theirs.loss, ours.loss) and torch.equal(theirs.gradient, ours.gradient)
    kept = {key: value for key, value in ours.metrics.items() if key in theirs.metrics}
    lacking = sorted(set(metrics) - theirs.metrics.keys())
    return Finding(name, same and kept == theirs.metrics and not lacking, ", ".join(lacking))


def _near(name: str, theirs: Outcome, ours: Outcome) -> Finding:
    errors = [_error(ours.loss, theirs.loss), _error(ours.gradient, theirs.gradient)]
    missing = theirs.metrics.keys() - ours.metrics.keys()
    figure = f"loss {errors[0]:.1e}, gradient {errors[1]:.1e}" + (f", lacks {sorted(missing)}" if missing else "")
    return Finding(name, max(errors) <= UNIFORM and not missing, figure)


def _raises(name: str, message: str, call: Callable[[], Any]) -> Finding:
    try:
        call()
    except Exception as error:
        passed = re.search(message, str(error)) is not None
        return Finding(name, passed, "" if passed else f"{type(error).__name__}: {error}")
    return Finding(name, False, "no error")


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
