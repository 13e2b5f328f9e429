"""The update equals a reference implementation of Flow-GRPO; STAR with strength 0 equals plain bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel
from doubled import rolled_out
from flow_grpo_update import check_update
from tiers import mostly_exhaustive
from torch import Tensor

from star_trainer import checkpoint
from star_trainer import trainer as module
from star_trainer.config import Config
from star_trainer.rollout import roll_out
from star_trainer.small import SMALL
from star_trainer.small.pipeline import build
from star_trainer.trainer import Trainer


@pytest.fixture(scope="module")
def medium_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the architecture of SD3.5-Medium: dual attention, RMS norms, a context-pre-only last block."""
    folder = tmp_path_factory.mktemp("medium")
    recipe = replace(SMALL, heads=2, blocks=3, text_width=32, latent_channels=16)
    pipeline = build(recipe)
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "dual_attention_layers": (0, 1), "pos_embed_max_size": 24}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    with torch.no_grad():  # the last layer is initialised to zero
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    pipeline.save_pretrained(folder)
    return folder


def test_the_update_is_flow_grpos(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    medium_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(
        model={"path": str(medium_folder), "lora_rank": 32, "lora_alpha": 64},
        rollout={"steps": 10, "guidance": 4.5, "groups": 2, "group_size": 3, "noise_level": 0.7},
        allocation={"method": "plain"},
        train={"clip_range": 1e-4, "kl_coef": 0.04, "learning_rate": 3e-4, "batch": 3},
    )
    trainer = trainer_of(config)
    model, policy = trainer.policy.model, trainer.policy

    def velocity_of(sample: Tensor, sigma: Tensor) -> Tensor:
        arguments = {"timestep": sigma.mul(1000).expand(config.samples), "return_dict": False}
        texts = [
            policy.encode(prompts)
            for prompts in ([""] * config.samples, [trainer.prompts[n // 3].text for n in range(config.samples)])
        ]
        without, with_text = (model(sample, text.tokens, text.pooled, **arguments)[0] for text in texts)
        return without + config.rollout.guidance * (with_text - without)

    check_update(trainer, config, velocity_of, monkeypatch)


@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_strength_0_is_plain_flow_grpo_to_the_last_bit(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path, ratio: str
) -> None:
    written = {}
    for method in ("plain", "star"):
        config = configure(
            allocation={"method": method, "strength": 0.0},
            train={"updates": 2, "ratio": ratio, "kl_coef": 0.01, "clip_range": 1e-3},
            output={"folder": str(tmp_path / method)},
        )
        trainer_of(config).run()
        written[method] = (tmp_path / method / "checkpoint-000001" / "weights.safetensors").read_bytes()
    assert written["plain"] == written["star"]


def test_full_strength_changes_the_update(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    found = {}
    for method in ("plain", "star"):
        config = configure(allocation={"method": method})
        trainer = trainer_of(config)
        batch = rolled_out(trainer, config)
        weights = [step.weights for step in batch.steps]
        if method == "star":
            assert all(w is not None and abs(float(w.mean()) - 1) < 1e-5 and float(w.std()) > 1e-3 for w in weights)
        else:
            assert weights == [None, None]
        trainer.updater.gradients([batch], torch.tensor([1.0, -1.0, 0.5, -0.5]))
        found[method] = torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters()])
    assert torch.nn.functional.cosine_similarity(*found.values(), dim=0) < 0.9999


def test_gradients_do_not_depend_on_the_batches(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    found = []
    for batch_size, train_batch in ((4, None), (4, 3), (1, 1)):
        config = configure(rollout={"batch": batch_size}, train={"batch": train_batch})
        trainer = trainer_of(config)
        parts = [range(n, n + batch_size) for n in range(0, 4, batch_size)]
        batches = [
            roll_out(trainer.policy, [trainer.prompts[n // 2] for n in p], p, config, 0, trainer.accelerator.autocast)
            for p in parts
        ]
        trainer.updater.gradients(batches, torch.tensor([1.0, -1.0, 0.5, -0.5]))
        found.append(torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))


@pytest.mark.parametrize(
    ("transition", "lora_rank"),
    mostly_exhaustive(
        product(("flow_sde", "flow_cps", "dance_sde"), (0, 4)), [("flow_sde", 4), ("flow_cps", 0), ("dance_sde", 4)]
    ),
)
def test_an_epoch_of_every_transition_changes_the_weights(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], transition: str, lora_rank: int
) -> None:
    config = configure(
        model={"lora_rank": lora_rank, "gradient_checkpointing": True},
        rollout={"transition": transition, "noise_level": 0.4},
        train={"ratio_norm": transition == "flow_sde", "kl_coef": 0.1, "passes": 2},
    )
    trainer = trainer_of(config)
    before = {n: p.detach().clone() for n, p in trainer.average.parameters.items()}
    metrics = trainer.train_epoch()
    changed = [n for n, p in trainer.average.parameters.items() if not torch.equal(p, before[n])]
    assert changed
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    assert metrics["loss/kl_loss"] > 0
    differences = [value for name, value in metrics.items() if name.startswith("log_prob_diff/")]
    assert len(differences) == 2 * len(set(trainer.updater.agreement)) > 0
    assert max(differences) < 1e-3  # of the first optimiser step: the weights are those of the rollout


def test_the_agreement_is_that_of_the_rollout_and_the_first_step(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of the update that computes something else than the rollout is visible, in the steps that it affects."""
    config = configure(train={"updates": 2, "passes": 2})
    trainer = trainer_of(config)
    velocity, first = trainer.policy.velocity, trainer.updater.schedule.timestep(0)

    def other(sample: Tensor, timestep: Any, *arguments: Any, **options: Any) -> Tensor:
        found = velocity(sample, timestep, *arguments, **options)
        return 1.05 * found if torch.is_grad_enabled() and bool(torch.as_tensor(timestep == first).all()) else found

    monkeypatch.setattr(trainer.policy, "velocity", other)
    metrics = trainer.train_epoch()
    assert metrics["log_prob_diff/step_0/mean"] > 1e-3
    assert metrics["log_prob_diff/step_0/max"] > metrics["log_prob_diff/step_0/mean"]
    assert metrics["log_prob_diff/step_1/max"] < 1e-3


def _set_gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Replaces gradients by ones, except for one element."""

    def gradients(*arguments: Any) -> dict[str, Tensor]:
        for parameter in trainer.average.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        parameter.grad.view(-1)[0] = value
        return {"policy_loss": torch.tensor(0.5)}

    monkeypatch.setattr(trainer.updater, "gradients", gradients)


def _everything(trainer: Trainer) -> dict[str, Tensor]:
    snapshot = checkpoint.take(trainer.saver.live, 1)
    assert snapshot is not None
    return {f"{part}.{n}": v for part, values in snapshot.tensors.items() for n, v in values.items()}


def test_a_step_with_gradients_that_are_not_finite_changes_nothing(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and the moving average do not change; the next step is applied again."""
    trainer = trainer_of(configure())
    _set_gradients(trainer, monkeypatch, 1.0)
    trainer.updater.step([], torch.zeros(4))
    before = _everything(trainer)
    for value in (torch.nan, torch.inf):
        _set_gradients(trainer, monkeypatch, value)
        trainer.updater.step([], torch.zeros(4))
        assert trainer.updater.skipped == 1
        after = _everything(trainer)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    _set_gradients(trainer, monkeypatch, 1.0)
    trainer.updater.step([], torch.zeros(4))
    assert trainer.updater.skipped == 0
    after = _everything(trainer)
    assert not any(torch.equal(after[name], value) for name, value in before.items() if name.startswith("average."))


def test_skipped_steps_are_counted_and_too_many_end_the_run(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(train={"updates": 2, "epochs": 99, "ema": 0.0})
    trainer = trainer_of(config)
    before = _everything(trainer)
    _set_gradients(trainer, monkeypatch, torch.nan)
    metrics = trainer.train_epoch()
    assert metrics["skipped_steps"] == 2
    assert not any(name.startswith("loss/") for name in metrics)
    monkeypatch.setattr(module, "PATIENCE", 4)
    with pytest.raises(
        FloatingPointError, match=r"the gradients of 4 consecutive optimiser steps, up to epoch 2, are not"
    ):
        trainer.run()
    after = _everything(trainer)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("weights."))


def test_weights_that_are_not_finite_are_named_instead_of_a_reward(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    trainer = trainer_of(configure(evaluation={"every": 1}))
    with torch.no_grad():
        next(iter(trainer.average.parameters.values())).fill_(torch.nan)
    for draw in (trainer.train_epoch, trainer.evaluate):
        with pytest.raises(FloatingPointError, match="the weights after epoch 0 contain NaN or infinity in 1 of"):
            draw()
        trainer.average.values.clear()  # the evaluation uses them


@pytest.mark.parametrize("limit", [0.0, None])
def test_gradient_clipping_can_be_disabled(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    monkeypatch: pytest.MonkeyPatch,
    limit: float | None,
) -> None:
    trainer = trainer_of(configure(train={"max_grad_norm": limit}))
    _set_gradients(trainer, monkeypatch, 2.0)
    seen = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: seen.extend(p.grad for p in parameters))
    parameters = list(trainer.average.parameters.values())
    trainer.updater.step([], torch.zeros(4))
    assert all(bool((grad.view(-1)[1:] == 1).all()) for grad in seen)
    assert float(trainer.updater.grad_norm) == pytest.approx((sum(p.numel() for p in parameters) + 3) ** 0.5, rel=1e-5)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Resets accelerate's global state, which keeps a precision once it is set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_forward_passes_train_float32_weights(configure: Callable[..., Config]) -> None:
    config = configure(model={"dtype": "bfloat16", "lora_rank": 4}, train={"mixed_precision": "bf16"})
    trainer = Trainer(config, Accelerator(cpu=True, mixed_precision="bf16"), progress=False)
    assert trainer.policy.model.pos_embed.proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.average.parameters.values()} == {torch.float32}
    metrics = trainer.train_epoch()
    assert all(torch.tensor(value).isfinite() for value in metrics.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 works on a GPU")
@pytest.mark.usefixtures("fresh_accelerate")
def test_float16_without_a_gpu_is_refused(configure: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"train\.mixed_precision must be 'no' or 'bf16' on a CPU"):
        Trainer(configure(train={"mixed_precision": "fp16"}), progress=False)
