"""The losses for VeRL-Omni equal VeRL-Omni's own without weights, and the library's losses with weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from flow_grpo_formulas import BATCH, LAYOUTS, Rollout, close, rollout
from verl_omni_contract import World, actor_config, dispatch, micro_batch, verl_omni

from star_kernels import allocate
from star_kernels.integrations.flow_grpo import dense_sde_step_with_logprob, policy_loss
from star_kernels.integrations.layout import map_layout
from star_kernels.integrations.verl_omni import feed_latents, register
from tools.clients.verl_omni_interface import MASK_METRICS, METRICS

__all__ = ["verl_omni"]  # the fixture

CLIP = 0.05
MODES = ("flow_grpo", "dance_grpo", "grpo_guard", "flow_dppo")


def run(
    world: World, problem: Rollout, batch: dict[str, Tensor], mode: str = "flow_grpo", v: Tensor | None = None
) -> tuple[Tensor, Tensor, dict]:
    """Loss, gradient with respect to the velocity, and metrics of step 1, through the engine."""
    v = (problem.new_v if v is None else v).clone().requires_grad_()
    engine = world.engine(lambda x: v, problem.made, problem.sde_type, problem.noise_level)
    loss, output = engine.forward_step(
        batch, loss_function=dispatch(world, actor_config(mode, CLIP)), forward_only=False, step=1
    )
    loss.backward()
    return loss.detach(), v.grad, output["metrics"]


def weights_for(problem: Rollout, *, ones: bool = False) -> Tensor:
    """[B, Steps, *locations] with mean one."""
    shape = problem.sample.shape
    locations = shape[1:2] if len(shape) == 3 else shape[2:]
    maps = torch.rand(len(problem.sample), *locations, generator=torch.Generator().manual_seed(1))
    weights = torch.ones_like(maps) if ones else allocate(maps, layout=map_layout(maps))
    return torch.stack([torch.zeros_like(weights), weights], dim=1)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("mode", MODES)
def test_without_weights_it_is_the_replaced_loss_bit_for_bit(verl_omni: World, mode: str, sde_type: str) -> None:
    problem = rollout("sd3", sde_type)
    factor = {"rollout_is_weights": torch.tensor([[9.0, 1.0], [9.0, 0.0], [9.0, 0.5], [9.0, 2.0]])}
    batches = [micro_batch(problem), micro_batch(problem) | factor]
    theirs = [run(verl_omni, problem, batch, mode) for batch in batches]
    register()
    for (loss, gradient, metrics), batch in zip(theirs, batches, strict=True):
        ours, our_gradient, our_metrics = run(verl_omni, problem, batch, mode)
        assert torch.equal(ours, loss)
        assert torch.equal(our_gradient, gradient)
        assert set(METRICS if mode != "flow_dppo" else MASK_METRICS) <= metrics.keys()
        assert metrics.items() <= our_metrics.items()


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_weights_of_one_are_the_replaced_loss(verl_omni: World, mode: str, layout: str, sde_type: str) -> None:
    problem = rollout(layout, sde_type, drift=0.1)  # steps that differ by sample
    problem.advantages[3] = 1.3
    batch = micro_batch(problem)
    factor = {"rollout_is_weights": torch.tensor([[9.0, 1.0], [9.0, 0.0], [9.0, 0.5], [9.0, 2.0]])}
    batch |= factor
    theirs = run(verl_omni, problem, batch, mode)
    register()
    ours = run(verl_omni, problem, batch | {"star_weights": weights_for(problem, ones=True)}, mode)
    close(ours[0], theirs[0], 2e-6)
    close(ours[1], theirs[1], 1e-5)
    for name, value in theirs[2].items():
        assert float(ours[2][name]) == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("layout", ["sd3", "flux"])
@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_with_weights_it_is_the_velocity_loss(verl_omni: World, layout: str, sde_type: str, ratio: str) -> None:
    register(ratio=ratio)
    problem = rollout(layout, sde_type)
    maps = torch.rand(BATCH, *((8, 8) if layout == "sd3" else (16, 16)), generator=torch.Generator().manual_seed(1))
    weights = allocate(maps, layout="bhw")
    step = (problem.made, problem.old_v, problem.timestep, problem.sample)
    old = dense_sde_step_with_logprob(*step, prev_sample=problem.old.prev_sample, **problem.settings)[1]
    v = problem.new_v.clone().requires_grad_()
    expected, _ = policy_loss(
        problem.made, v, problem.timestep, problem.sample, problem.old.prev_sample, old, problem.advantages,
        clip_range=CLIP, weights=weights, ratio=ratio, **problem.settings,
    )  # fmt: skip
    expected.backward()
    for name, brought in {"star_weights": weights, "star_maps": maps}.items():
        batch = micro_batch(problem) | {name: torch.stack([torch.zeros_like(maps), brought], dim=1)}
        loss, gradient, _ = run(verl_omni, problem, batch)
        close(loss, expected)
        close(gradient, v.grad)
    plain, _, _ = run(verl_omni, problem, micro_batch(problem))
    assert abs(float(plain - expected.detach())) > 1e-5


def test_guard_with_weights_is_its_formula_at_each_location(verl_omni: World) -> None:
    problem = rollout("sd3")
    weights = weights_for(problem)
    register()
    loss, gradient, _ = run(verl_omni, problem, micro_batch(problem) | {"star_weights": weights}, "grpo_guard")
    v = problem.new_v.clone().requires_grad_()
    new, old = problem.written(v), problem.old
    root = new.sqrt_dt.mean()
    scale = root * new.std_dev_t.mean()
    change = (new.log_prob - old.log_prob + (new.mean - old.mean) ** 2 / (2 * scale**2)).mean(dim=1) * scale
    ratio = (weights[:, 1] * change).flatten(1).mean(dim=1).exp()
    a = problem.advantages.clamp(-5, 5)
    expected = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).mean() / root**2
    expected.backward()
    close(loss, expected, 2e-6)
    close(gradient, v.grad, 1e-5)


@pytest.mark.parametrize("ratio", ["sample", "location"])
@pytest.mark.parametrize("mode", MODES)
def test_the_ratio_of_an_unchanged_model_is_one(verl_omni: World, mode: str, ratio: str) -> None:
    register(ratio=ratio)
    for sde_type in ("sde", "cps"):
        problem = rollout("sd3", sde_type)
        batch = micro_batch(problem) | {"star_weights": weights_for(problem)}
        metrics = run(verl_omni, problem, batch, mode, problem.old_v)[2]
        assert float(metrics["actor/ratio_mean"]) == pytest.approx(1, abs=1e-6)
        assert float(metrics["actor/ratio_max"]) == pytest.approx(1, abs=1e-6)


def test_diffusion_nft(verl_omni: World) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, 4, 8, 8)
    prediction, old, reference, x0, noise = (torch.randn(shape, generator=generator) for _ in range(5))
    t = torch.tensor([0.9, 0.5, 0.2, 0.05]).view(-1, 1, 1, 1)
    likely = torch.tensor([[0.0, 0.9], [0.0, 0.1], [0.0, 0.5], [0.0, 0.0]])

    def nft(**extra: Tensor) -> tuple[Tensor, Tensor, dict]:
        v = prediction.clone().requires_grad_()
        outputs = {
            "forward_prediction": v, "old_prediction": old, "ref_forward_prediction": reference, "x0": x0,
            "xt": (1 - t) * x0 + t * noise, "t_expanded": t,
        }  # fmt: skip
        engine = verl_omni.engines.NFTDiffusersFSDPEngine()
        function = dispatch(verl_omni, actor_config("diffusion_nft"))
        loss, output = engine.forward_step({"outputs": outputs, "reward_prob": likely, **extra}, function, False, 1)
        loss.backward()
        return loss.detach(), v.grad, output["metrics"]

    theirs = nft()
    register()
    ours = nft()
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    ones = nft(star_weights=torch.ones(BATCH, 2, 8, 8))
    close(ones[0], theirs[0])
    close(ones[1], theirs[1], 1e-5)
    halves = torch.zeros(BATCH, 2, 2, 1)
    halves[:, :, 0] = 2
    upper = nft(star_weights=halves)
    penalty = 0.1 * 2 * (prediction - reference) / prediction.numel()
    close(upper[1][:, :, 4:], penalty[:, :, 4:], 1e-5)
    config = actor_config("diffusion_nft")
    config.diffusion_loss.adaptive_weight_min = 1e-3
    with pytest.raises(ValueError, match=r"adaptive_weight_min must be 1e-05 with weights, got 0\.001"):
        verl_omni.registry["diffusion_nft"](config=config, model_output={}, data={"star_weights": ones[1]})


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_sampler_is_an_error_that_names_the_right_one(verl_omni: World, mode: str) -> None:
    for right, wrong in (("sde", "cps"), ("cps", "sde"), ("sde", "dance_sde")):
        register(sde_type=wrong)
        problem = rollout("sd3", right)
        batch = micro_batch(problem)
        run(verl_omni, problem, batch, mode)  # without weights it does not matter
        with pytest.raises(ValueError, match=f"got '{wrong}', whose .*; they are those of '{right}'"):
            run(verl_omni, problem, batch | {"star_weights": weights_for(problem)}, mode)


def test_another_latent_or_mean_is_an_error(verl_omni: World) -> None:
    register()
    problem = rollout("sd3")
    batch = micro_batch(problem) | {"star_weights": weights_for(problem)}
    with pytest.raises(ValueError, match=r"sampler of old_log_probs, .*computed for another latent"):
        run(verl_omni, problem, batch | {"old_prev_sample_mean": batch["old_prev_sample_mean"] + 0.3})


def test_explicit_next_latents_are_used(verl_omni: World) -> None:
    register()
    problem = rollout("sd3")
    batch = micro_batch(problem) | {"star_weights": weights_for(problem)}
    expected = run(verl_omni, problem, batch)
    latents = batch["all_latents"]
    pairs = batch | {"all_next_latents": latents[:, 1:], "all_latents": latents[:, :-1]}
    assert torch.equal(run(verl_omni, problem, pairs)[0], expected[0])
    del pairs["all_next_latents"]
    pairs["all_latents"] = torch.cat([latents[:, :-1]] * 2, dim=1)
    with pytest.raises(KeyError, match=r"lacks prev_sample: .*all_next_latents, or one latent more"):
        run(verl_omni, problem, pairs)


def test_agreement_with_rollout_and_old_model_is_measured(verl_omni: World) -> None:
    register()
    problem = rollout("sd3")
    batch = micro_batch(problem) | {"star_weights": weights_for(problem)}
    batch["rollout_log_probs"] = batch["old_log_probs"] + torch.tensor([0.0, 0.1, 0.2, 0.5])[:, None]
    metrics = run(verl_omni, problem, batch, v=problem.old_v)[2]
    assert float(metrics["actor/rollout_log_prob_diff/step_1/mean"]) == pytest.approx(0.2, abs=1e-5)
    assert float(metrics["actor/rollout_log_prob_diff/step_1/max"]) == pytest.approx(0.5, abs=1e-5)
    assert float(metrics["actor/old_log_prob_diff/step_1/max"]) == 0
    metrics = run(verl_omni, problem, batch)[2]
    change = (problem.written(problem.new_v).log_prob - problem.old.log_prob).mean(dim=1)
    assert float(metrics["actor/old_log_prob_diff/step_1/max"]) == pytest.approx(float(change.abs().max()), rel=1e-4)


def test_modes_without_support_refuse_weights(verl_omni: World) -> None:
    problem = rollout("sd3")
    theirs = run(verl_omni, problem, micro_batch(problem), "dpo")
    register()
    assert torch.equal(run(verl_omni, problem, micro_batch(problem), "dpo")[0], theirs[0])
    batch = micro_batch(problem) | {"star_weights": weights_for(problem)}
    with pytest.raises(NotImplementedError, match=r"loss_mode='dpo' does not support weights: use flow_grpo"):
        run(verl_omni, problem, batch, "dpo")
    engine = verl_omni.engines.DPODiffusersFSDPEngine()
    assert engine.forward_step({}, lambda **_: 1, False, None)[0] == 1
    for weighted in ({"star_weights": torch.ones(1)}, {"star_maps": torch.ones(1)}):
        with pytest.raises(NotImplementedError, match="DPODiffusersFSDPEngine does not support weights"):
            engine.forward_step(weighted, lambda **_: 1, False, None)


def test_losses_that_are_added_to_another_ignore_its_weights(verl_omni: World) -> None:
    problem = rollout("sd3")
    register()
    new = problem.written(problem.new_v)
    arguments = {
        "model_output": {"log_probs": new.log_prob_mean},
        "data": {"old_log_probs": problem.old.log_prob_mean, "advantages": problem.advantages, "star_weights": 1},
    }
    added = verl_omni.registry["dpo"](config=actor_config("flow_grpo"), **arguments)
    assert bool(added.loss.isfinite())


def test_the_registered_classes_are_verl_omnis(verl_omni: World) -> None:
    before = {name: type(loss) for name, loss in verl_omni.registry.items()}
    for _ in range(2):  # a second call replaces the first, and does not inherit from it
        made = register()
        for name, loss in verl_omni.registry.items():
            assert type(loss) is made[name]
            assert issubclass(made[name], before[name])
            assert made[name].__bases__[1] is before[name]
            assert made[name].compute_loss.__func__ is before[name].compute_loss.__func__
            assert loss.required_data_keys == before[name].required_data_keys
    assert verl_omni.registry["flow_grpo"].prepare_actor_batch("batch", None, None) == "batch"
    with pytest.raises(ValueError, match="ratio must be 'sample' or 'location', got 'token'"):
        register(ratio="token")
    with pytest.raises(ValueError, match="sde_type must be None or one of sde, cps, dance_sde, got 'ode'"):
        register(sde_type="ode")


def test_unknown_engines_are_an_error(verl_omni: World) -> None:
    for name in ("PPODiffusersFSDPEngine", "NFTDiffusersFSDPEngine"):
        delattr(verl_omni.engines, name)
    with pytest.raises(RuntimeError, match=r"must have the engine PPO.* got DPODiffusersFSDPEngine: this version"):
        register()


def test_engines_are_patched_once_and_unchanged_without_a_loss(verl_omni: World) -> None:
    register()
    changed = verl_omni.engine.forward_step
    register(strength=0.5)
    assert verl_omni.engine.forward_step is changed
    assert feed_latents(verl_omni.engine) is verl_omni.engine
    problem = rollout()
    engine = verl_omni.engine(lambda x: problem.new_v, problem.made, "sde", 0.7)
    loss, output = engine.forward_step(micro_batch(problem), loss_function=None, forward_only=True, step=1)
    assert loss is None
    close(output["model_output"]["prev_sample_mean"], problem.written(problem.new_v).mean)


def test_missing_tensors_are_named(verl_omni: World) -> None:
    register()
    loss = verl_omni.registry["flow_grpo"]
    data: dict[str, Any] = {"old_log_probs": None, "advantages": None}
    loss.validate_inputs(loss_name="mine", model_output={"log_probs": None}, data=data)
    with pytest.raises(KeyError, match=r"Missing data keys: \['advantages'\]"):  # VeRL-Omni's own text
        loss.validate_inputs(loss_name="mine", model_output={"log_probs": None}, data={"old_log_probs": None})
    with pytest.raises(
        KeyError, match=r"'mine' with weights lacks prev_sample_mean, std_dev_t, sqrt_dt, prev_sample, "
    ):
        loss.validate_inputs(loss_name="mine", model_output={"log_probs": None}, data=data | {"star_maps": None})
    with pytest.raises(KeyError, match=r"star_sde_type: prev_sample and .*feed_latents.*bypass_mode=False"):
        loss.validate_inputs(loss_name="mine", model_output={"log_probs": None}, data=data | {"star_weights": None})
    register(ratio="location")
    with pytest.raises(KeyError, match="with weights lacks prev_sample_mean"):
        verl_omni.registry["flow_grpo"].validate_inputs(loss_name="mine", model_output={"log_probs": 0}, data=data)


def test_the_module_imports_without_verl_omni_and_register_names_it() -> None:
    program = (
        "from star_kernels.integrations import flow_grpo, verl_omni\n"
        "import sys\n"
        "assert not {'diffusers', 'verl_omni', 'transformers'} & set(sys.modules)\n"
        "try:\n    verl_omni.register()\n"
        "except ImportError as error:\n    assert 'register() requires VeRL-Omni' in str(error), error\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
