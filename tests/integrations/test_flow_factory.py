"""Flow-Factory's trainers with weights: their own numbers without them, and the weighted ratio with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from flow_factory_contract import Adapter, GRPOGuardTrainer, GRPOTrainer, State, flow_factory
from flow_grpo_formulas import close
from small_pipelines import PROMPTS, embeddings, flux_pipeline

from star_kernels import allocate
from star_kernels.capture import capture_maps
from star_kernels.integrations import flow_factory as ours
from star_kernels.prompts import regions_of, select_tokens

__all__ = ["flow_factory"]

TRAINERS = {"grpo": GRPOTrainer, "grpo-guard": GRPOGuardTrainer}
IMAGE, AUDIO = ("latent",), ("video", "audio")


def select(batch: Any, pipeline: Any) -> Any:
    return select_tokens(batch["prompt"], regions_of(pipeline))[0]


class Problem:
    """A batch of two samples: the rollout of a model, and the model after a change of its weights."""

    def __init__(self, names: tuple[str, ...] = IMAGE, dynamics: str = "Flow-SDE", *, drift: float = 0.02) -> None:
        torch.manual_seed(1)
        self.pipeline = flux_pipeline(channels=64)
        text, pooled = embeddings(2, 1)
        ids = torch.zeros(64, 3)
        ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
        self.inputs = {
            "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": torch.full((2,), 0.5),
            "img_ids": ids, "txt_ids": torch.zeros(text.shape[1], 3), "return_dict": False,
        }  # fmt: skip
        self.scale = torch.nn.Parameter(torch.ones(()))  # of the audio
        self.adapter = Adapter(self.pipeline, self.velocity, names, dynamics)
        shapes = {"audio": (2, 5, 7)}
        state, following = (State({n: torch.randn(shapes.get(n, (2, 64, 64))) for n in names}) for _ in range(2))
        with torch.no_grad():
            old = self.adapter.forward_state(state, following)
            following = State({n: m + 0.2 * torch.randn_like(m) for n, m in old.next_state_mean.components.items()})
            old = self.adapter.forward_state(state, following)
            for parameter in [*self.pipeline.transformer.parameters(), self.scale]:
                parameter += drift * parameter.abs().mean()
        self.replay = SimpleNamespace(
            state=state, next_state=following, log_prob=old.log_prob, component_log_probs=old.component_log_probs
        )
        self.batch = {"prompt": PROMPTS, "next_latents_mean": old.next_state_mean}

    def velocity(self, name: str, sample: Tensor) -> Tensor:
        if name == "audio":
            return self.scale * sample.roll(1, 0)
        return self.pipeline.transformer(hidden_states=sample, **self.inputs)[0]

    def ratio(self, trainer: type[Any]) -> tuple[Tensor, list[Tensor], Any]:
        made = trainer(adapter=self.adapter)
        parameters = [*self.pipeline.transformer.parameters(), self.scale]
        for parameter in parameters:
            parameter.grad = None
        ratio = made.ratio(self.batch, self.replay)
        (ratio * torch.tensor([1.0, -2.0])).sum().backward()
        return ratio.detach(), [p.grad for p in parameters if p.grad is not None], made


@pytest.mark.parametrize("names", [IMAGE, AUDIO])
@pytest.mark.parametrize("kind", TRAINERS)
def test_without_select_the_numbers_are_flow_factorys(
    flow_factory: dict[str, type], kind: str, names: tuple[str, ...]
) -> None:
    ours.register()
    problem = Problem(names)
    ratio, gradients, made = problem.ratio(flow_factory[kind])
    expected, theirs, _ = problem.ratio(TRAINERS[kind])
    assert torch.equal(ratio, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))
    output = problem.adapter.forward_state(problem.replay.state, problem.replay.next_state)
    change = (output.log_prob - problem.replay.log_prob).detach().abs()
    close(made.logged["log_prob_diff/step_2/mean"][0], change.mean())
    close(made.logged["log_prob_diff/step_2/max"][0], change.amax())
    assert made.generate_samples(compute_log_prob=True) == {"compute_log_prob": True}


@pytest.mark.parametrize(
    ("kind", "names", "dynamics"),
    [
        ("grpo", IMAGE, "Flow-SDE"),
        ("grpo", AUDIO, "Dance-SDE"),
        ("grpo", IMAGE, "CPS"),
        ("grpo-guard", IMAGE, "Flow-SDE"),
        ("grpo-guard", AUDIO, "Flow-SDE"),
    ],
)
def test_uniform_weights_change_nothing(
    flow_factory: dict[str, type], kind: str, names: tuple[str, ...], dynamics: str
) -> None:
    ours.register(select, strength=0.0)
    problem = Problem(names, dynamics)
    ratio, gradients, made = problem.ratio(flow_factory[kind])
    expected, theirs, _ = problem.ratio(TRAINERS[kind])
    close(ratio, expected)
    close(*(torch.cat([g.flatten() for g in found]) for found in (gradients, theirs)), 2e-4)
    assert made.generate_samples(compute_log_prob=True)["extra_call_back_kwargs"] == ["next_latents_mean"]
    assert made._canonical_return_fields({"log_prob"}) == ("dt", "log_prob", "next_latents_mean", "std_dev_t")


def test_the_log_ratio_has_the_weights_of_the_maps(flow_factory: dict[str, type]) -> None:
    ours.register(select)
    problem = Problem()
    ratio, gradients, made = problem.ratio(flow_factory["grpo"])
    state, following = problem.replay.state, problem.replay.next_state
    output = problem.adapter.forward_state(state, following)
    with capture_maps(problem.pipeline.transformer, select(problem.batch, problem.pipeline)) as maps, torch.no_grad():
        problem.velocity("latent", state.components["latent"])
    weights = allocate(maps.value[:, 0], layout="bhw").flatten(1)
    std = output.std_dev_t["latent"] * torch.sqrt(-output.dt["latent"])
    drawn = following.components["latent"]
    new, old = (
        torch.distributions.Normal(m.components["latent"], std).log_prob(drawn).mean(dim=-1)
        for m in (output.next_state_mean, problem.batch["next_latents_mean"])
    )
    close(ratio, (weights * (new - old)).mean(dim=1).exp(), 1e-5)
    assert float((ratio - (new - old).mean(dim=1).exp()).detach().abs().max()) > 1e-4
    assert any(bool(g.any()) for g in gradients)
    close(made.logged["log_prob_diff/step_2/max"][0], (new - old).abs().amax(), 1e-4)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_ratio_of_a_model_that_has_not_changed_is_one(flow_factory: dict[str, type], kind: str) -> None:
    ours.register(select)
    for names in (IMAGE, AUDIO):
        ratio, _, _ = Problem(names, drift=0.0).ratio(flow_factory[kind])
        close(ratio, torch.ones(2), 1e-6)


def test_another_sampler_is_an_error(flow_factory: dict[str, type]) -> None:
    ours.register(select)
    problem = Problem()
    forward = problem.adapter.forward_state
    scheduler = problem.adapter.scheduler_group["latent"]

    def other(*arguments: Any) -> Any:
        scheduler.dynamics_type = "Flow-SDE"
        output = forward(*arguments)
        scheduler.dynamics_type = "CPS"
        return output

    problem.adapter.forward_state = other  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"sde_type must be the sampler of component_log_probs\['latent'\] \(CPS\)"):
        problem.ratio(flow_factory["grpo"])
    scheduler.dynamics_type = "ODE"
    problem.adapter.forward_state = forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="dynamics_type of latent must be Flow-SDE, Dance-SDE, CPS for weights"):
        problem.ratio(flow_factory["grpo"])


def test_masked_latents_are_refused(flow_factory: dict[str, type]) -> None:
    ours.register(select)
    problem = Problem()
    problem.replay.state.active_masks = {"latent": torch.ones(2, 64, 1, dtype=torch.bool)}
    with pytest.raises(ValueError, match="without active_masks"):
        problem.ratio(flow_factory["grpo"])


def test_versions_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        """A trainer of May 2026: its step is in one method."""

    with pytest.raises(ImportError, match=r"commit b30dc00.* without _replay_forward"):
        ours.star(Old)
    with pytest.raises(ImportError, match=r"register\(\) requires a version of Flow-Factory with trainers/rl/grpo.py"):
        ours.register()


def test_the_guide_registers_the_trainers(flow_factory: dict[str, type]) -> None:
    import re
    import sys

    page = Path(__file__).resolve().parents[2] / "docs" / "flow-factory.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    ran = []
    sys.modules["flow_factory.train"] = SimpleNamespace(main=lambda: ran.append(dict(flow_factory)))  # type: ignore[assignment]
    try:
        exec(example, {})
    finally:
        del sys.modules["flow_factory.train"]
    (registered,) = ran
    problem = Problem()
    ratio, _, _ = problem.ratio(registered["grpo"])
    assert bool((ratio != 1).all())
