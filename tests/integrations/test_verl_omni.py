"""The loss for VeRL-Omni equals VeRL-Omni's losses without weights, and the library's loss with weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import FluxTransformer2DModel
from flow_grpo_formulas import BATCH, LAYOUTS, Rollout, close, rollout
from verl_omni_contract import World, actor_config, dispatch, micro_batch, own_loss, verl_omni

from star_kernels import TokenSelection, allocate, flow_cps, flow_sde
from star_kernels.capture import capture_maps
from star_kernels.integrations.flow_grpo import dense_sde_step_with_logprob, policy_loss
from star_kernels.integrations.layout import map_layout
from star_kernels.integrations.verl_omni import (
    StarGuardLoss,
    StarLoss,
    feed_latents,
    mean_transition,
    policy_loss_of_means,
    ratio_of_means,
    register,
)

__all__ = ["verl_omni"]  # the fixture

CLIP = 0.05


def run(
    world: World, problem: Rollout, batch: dict[str, Tensor], mode: str = "flow_grpo"
) -> tuple[Tensor, Tensor, dict]:
    """Loss, gradient with respect to the velocity, and metrics of step 1, through the engine."""
    v = problem.new_v.clone().requires_grad_()
    engine = world.engine(lambda x: v, problem.made, problem.sde_type, problem.noise_level)
    loss, output = engine.forward_step(
        batch, loss_function=dispatch(world, actor_config(mode, CLIP)), forward_only=False, step=1
    )
    loss.backward()
    return loss.detach(), v.grad, output["metrics"]


def own(problem: Rollout, batch: dict[str, Tensor], *, guard: bool) -> tuple[Tensor, Tensor]:
    v = problem.new_v.clone().requires_grad_()
    new = problem.written(v)
    output = {
        "log_probs": new.log_prob_mean,
        "prev_sample_mean": new.mean,
        "std_dev_t": new.std_dev_t,
        "sqrt_dt": new.sqrt_dt.flatten(),
    }
    names = ("old_log_probs", "advantages", "old_prev_sample_mean", "rollout_is_weights")
    loss = own_loss(output, {name: batch[name][:, 1] for name in names if name in batch}, CLIP, guard=guard)
    loss.backward()
    return loss.detach(), v.grad


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weights_it_is_verl_omnis_flow_grpo(verl_omni: World, layout: str, sde_type: str) -> None:
    register(sde_type=sde_type)
    problem = rollout(layout, sde_type)
    batch = micro_batch(problem)
    for extra in ({}, {"rollout_is_weights": torch.tensor([[9.0, 1.0], [9.0, 0.0], [9.0, 0.5], [9.0, 2.0]])}):
        loss, gradient, metrics = run(verl_omni, problem, batch | extra)
        expected, expected_gradient = own(problem, batch | extra, guard=False)
        close(loss, expected)
        close(gradient, expected_gradient)
        assert {"actor/pg_clipfrac", "actor/ratio_mean"} <= set(metrics)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weights_it_is_verl_omnis_guard(verl_omni: World, layout: str) -> None:
    register("grpo_guard", StarGuardLoss)
    problem = rollout(layout, steps=(4, 4, 4, 4))  # one timestep: VeRL-Omni uses the mean scale of the batch
    batch = micro_batch(problem)
    loss, gradient, _ = run(verl_omni, problem, batch, "grpo_guard")
    expected, expected_gradient = own(problem, batch, guard=True)
    close(loss, expected)
    close(gradient, expected_gradient, 1e-5)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("layout", ["sd3", "flux"])
@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_with_weights_it_is_the_velocity_loss(verl_omni: World, layout: str, sde_type: str, ratio: str) -> None:
    register(sde_type=sde_type, ratio=ratio)
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


def test_maps_are_allocated_in_the_layout_of_their_grid() -> None:
    for shape, layout in {(2, 64): "bp", (2, 8, 8): "bhw", (2, 3, 8, 8): "bfhw"}.items():
        assert map_layout(torch.ones(shape)) == layout
    with pytest.raises(ValueError, match=r"maps must have shape \[B, P\], \[B, h, w\] or \[B, F, h, w\], got \[2\]"):
        map_layout(torch.ones(2))


def test_mean_transition_has_the_coefficients_of_the_sampler() -> None:
    sigma, following = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.6, 0.0])
    sde = flow_sde(sigma, following, noise_level=0.7, sigma_max=0.9)
    root = torch.sqrt(sigma - following)
    of_means = mean_transition((sde.std / root)[:, None, None], root)
    torch.testing.assert_close(of_means.coefficients[2:], sde.coefficients[2:], rtol=1e-6, atol=1e-6)
    assert of_means.coefficients[:2].T.tolist() == [[0, 1]] * 3
    cps = flow_cps(sigma[:2], following[:2], noise_level=0.8)
    of_means = mean_transition(cps.std[:, None], root[:2], sde_type="cps")
    torch.testing.assert_close(of_means.coefficients[2:], cps.coefficients[2:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_the_kl_penalty_from_means_equals_that_from_velocities(sde_type: str) -> None:
    problem = rollout("flux", sde_type)
    step = (problem.made, problem.new_v, problem.timestep, problem.sample, problem.old.prev_sample)
    expected, _ = policy_loss(
        *step,
        problem.old.log_prob_mean,
        problem.advantages,
        beta=0.3,
        ref_model_output=problem.ref_v,
        **problem.settings,
    )
    new = problem.written(problem.new_v)
    loss, _ = policy_loss_of_means(
        new.mean, problem.old.prev_sample, new.std_dev_t, new.sqrt_dt, problem.advantages,
        old_log_prob=problem.old.log_prob_mean, beta=0.3, ref_prev_sample_mean=problem.written(problem.ref_v).mean,
        sde_type=sde_type,
    )  # fmt: skip
    close(loss, expected)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_the_ratio_of_means_equals_the_formulas(sde_type: str) -> None:
    problem = rollout("qwen_image", sde_type)
    v, w = (problem.new_v.clone().requires_grad_() for _ in range(2))
    new, expected = problem.written(v), problem.written(w)
    ratio = ratio_of_means(
        new.mean, problem.old.prev_sample, new.std_dev_t, new.sqrt_dt, old_prev_sample_mean=problem.old.mean,
        sde_type=sde_type,
    )  # fmt: skip
    written = (expected.log_prob_mean - problem.old.log_prob_mean).exp()
    upstream = torch.tensor([0.5, -1.0, 2.0, 1.0])
    (ratio * upstream).sum().backward()
    (written * upstream).sum().backward()
    close(ratio, written)
    close(v.grad, w.grad)


def test_the_ratio_of_means_applies_weights() -> None:
    problem = rollout("flux")
    new = problem.written(problem.new_v)
    arguments = (new.mean, problem.old.prev_sample, new.std_dev_t, new.sqrt_dt)
    weights = torch.rand(BATCH, 16, 16, generator=torch.Generator().manual_seed(1))
    ratio = ratio_of_means(*arguments, old_prev_sample_mean=problem.old.mean, weights=weights)
    change = (new.log_prob - problem.old.log_prob).mean(dim=-1)  # [B, S]
    close(ratio, (weights.flatten(1) * change).mean(dim=1).exp(), 1e-5)


def test_the_ratio_of_means_of_an_unchanged_model_is_one_with_guard_too() -> None:
    old = rollout("flux").old
    ratio = ratio_of_means(
        old.mean, old.prev_sample, old.std_dev_t, old.sqrt_dt, old_prev_sample_mean=old.mean, guard=True
    )
    close(ratio, torch.ones(BATCH))


def test_the_ratio_of_means_rejects_options_of_the_loss() -> None:
    old = rollout("flux").old
    arguments = (old.mean, old.prev_sample, old.std_dev_t, old.sqrt_dt)
    for name in ("adv_clip_max", "step_weights", "beta", "clip_range"):
        with pytest.raises(TypeError, match=f"{name} must not be given"):
            ratio_of_means(*arguments, old_prev_sample_mean=old.mean, **{name: 0.5})


def test_means_are_not_broadcast() -> None:
    old = rollout("flux").old
    for name in ("prev_sample", "old_prev_sample_mean"):
        latents = {"prev_sample": old.prev_sample, "old_prev_sample_mean": old.mean}
        latents[name] = latents[name][:1]
        with pytest.raises(ValueError, match=f"^{name} must have the shape of prev_sample_mean"):
            policy_loss_of_means(
                old.mean, std_dev_t=old.std_dev_t, sqrt_dt=old.sqrt_dt, advantages=torch.ones(BATCH), **latents
            )


def test_the_registered_class_is_a_verl_omni_loss(verl_omni: World) -> None:
    made = register()
    loss = verl_omni.registry["flow_grpo"]
    assert type(loss) is made
    assert isinstance(loss, StarLoss)
    assert loss.prepare_actor_batch("batch") == "batch"  # inherited from VeRL-Omni's base class


def test_the_engine_is_patched_once_and_unchanged_without_a_loss(verl_omni: World) -> None:
    register()
    changed = verl_omni.engine.forward_step
    register("grpo_guard", StarGuardLoss)
    assert verl_omni.engine.forward_step is changed
    assert feed_latents(verl_omni.engine) is verl_omni.engine
    problem = rollout()
    engine = verl_omni.engine(lambda x: problem.new_v, problem.made, "sde", 0.7)
    loss, output = engine.forward_step(micro_batch(problem), loss_function=None, forward_only=True, step=1)
    assert loss is None
    close(output["model_output"]["prev_sample_mean"], problem.written(problem.new_v).mean)


class GuidedTransformer(torch.nn.Module):
    """Guided velocities from a transformer that runs twice, with different texts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        ids = torch.zeros(256, 3)
        ids[:, 1], ids[:, 2] = torch.arange(256) // 16, torch.arange(256) % 16
        self.inputs = {
            "pooled_projections": torch.randn(BATCH, 16),
            "timestep": torch.full((BATCH,), 0.5),
            "img_ids": ids,
            "txt_ids": torch.zeros(7, 3),
        }
        self.texts = torch.randn(2, BATCH, 7, 32)

    def forward(self, latents: Tensor) -> Tensor:
        positive, negative = (
            self.module(hidden_states=latents, encoder_hidden_states=text, **self.inputs, return_dict=False)[0]
            for text in self.texts
        )
        return negative + 2.0 * (positive - negative)


def test_maps_of_the_conditional_pass_are_passed_to_the_loss(verl_omni: World) -> None:
    selection = TokenSelection.from_positions([[1, 2]] * BATCH)
    seen: list[dict[str, Tensor]] = []

    class Recording(StarLoss):
        def __call__(self, *, config: Any, model_output: Any, data: Any) -> Any:
            seen.append(data)
            return super().__call__(config=config, model_output=model_output, data=data)

    register(loss=Recording, select=lambda micro_batch: selection)
    problem, model = rollout("flux"), GuidedTransformer()
    engine = verl_omni.engine(model, problem.made, "sde", 0.7)
    loss_function = dispatch(verl_omni, actor_config("flow_grpo", CLIP))
    batch = micro_batch(problem)
    loss, _ = engine.forward_step(batch, loss_function=loss_function, forward_only=False, step=1)
    loss.backward()
    with capture_maps(model.module, selection, cfg=None) as capture, torch.no_grad():
        model.module(hidden_states=problem.sample, encoder_hidden_states=model.texts[0], **model.inputs)
    close(seen[0]["star_maps"], capture.value[:, 0])
    register(loss=Recording)  # without select
    engine.forward_step(batch, loss_function=loss_function, forward_only=False, step=1)
    assert "star_maps" not in seen[1]


def test_missing_tensors_are_named(verl_omni: World) -> None:
    loss = register()()
    full = dict.fromkeys(loss.required_model_output_keys)
    with pytest.raises(KeyError, match=r"'mine' lacks sqrt_dt, prev_sample: prev_sample is added by .*feed_latents"):
        loss.validate_inputs(
            loss_name="mine",
            model_output={key: None for key in full if key != "sqrt_dt"},
            data={"old_log_probs": None, "advantages": None},
        )
    data: dict[str, Any] = dict.fromkeys((*loss.required_data_keys, "star_weights"))
    with pytest.raises(KeyError, match=r"lacks old_prev_sample_mean: .*bypass_mode=False"):
        loss.validate_inputs(loss_name="mine", model_output=full, data=data)
    loss.validate_inputs(loss_name="mine", model_output=full, data=data | {"old_prev_sample_mean": None})
    del data["star_weights"]
    loss.validate_inputs(loss_name="mine", model_output=full, data=data)
    with pytest.raises(KeyError, match=r"lacks old_prev_sample_mean"):
        register(ratio="location")().validate_inputs(loss_name="mine", model_output=full, data=data)


def test_errors_name_the_argument() -> None:
    problem = rollout()
    arguments = (problem.old.mean, problem.old.prev_sample, torch.ones(4), torch.ones(4), problem.advantages)
    with pytest.raises(ValueError, match=r"old_prev_sample_mean must be given if old_log_prob is None, got None"):
        policy_loss_of_means(*arguments)
    with pytest.raises(ValueError, match=r"old_prev_sample_mean must be given with guard=True, got None"):
        policy_loss_of_means(*arguments, old_log_prob=torch.zeros(4), guard=True)
    with pytest.raises(ValueError, match=r"sde_type must be 'sde' or 'cps', got 'ode'"):
        mean_transition(torch.ones(4), torch.ones(4), sde_type="ode")


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
