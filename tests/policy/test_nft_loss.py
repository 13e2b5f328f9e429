"""The contract of ``weighted_nft_loss``, for every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import BATCH, LAYOUTS, SIGMA, close, locations, make, patch_weights, upsampled
from torch import Tensor

from star_kernels import weighted_nft_loss


class Batch:
    """Images noised to several levels, the outputs of two models, and advantages."""

    def __init__(self, backend: tuple[str, str], layout: str = "image", drift: float = 0.05) -> None:
        shape, self.channel_dim = LAYOUTS[layout]
        generator = torch.Generator().manual_seed(0)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator).to(backend[1])

        self.backend, self.layout = backend, layout
        self.noise, self.image = normal(), normal()
        self.target = self.noise - self.image
        self.old = self.target + 0.5 * normal()
        self.output = self.old + drift * normal()
        self.reference = self.old + 0.1 * normal()
        self.sigma = SIGMA.to(backend[1])
        self.advantages = torch.tensor([1.5, -0.7, 9.0, -6.0], device=backend[1])

    def run(self, upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, gradient and metrics."""
        leaf = self.output.detach().requires_grad_()
        loss, metrics = weighted_nft_loss(
            leaf, self.old, self.target, self.advantages, self.sigma,
            channel_dim=self.channel_dim, backend=self.backend[0], **options,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        return loss.detach(), gradient, metrics

    def options(self) -> dict[str, Any]:
        problem = make(self.backend, self.layout)
        shape = list(problem.old_log_prob.shape)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
        mask.flatten(1)[:, 0] = True
        return {
            "weights": patch_weights(problem, shape[1:]),
            "mask": mask.to(self.backend[1]),
            "step_weights": torch.linspace(0.5, 2.0, BATCH, device=self.backend[1]),
            "ref_model_output": self.reference,
            "kl_coef": 0.1,
            "weighted_kl": True,
        }

    def published(
        self,
        *,
        beta: float = 1.0,
        adaptive: bool = True,
        advantage_clip: float = 5.0,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        step_weights: Tensor | None = None,
        ref_model_output: Tensor | None = None,
        kl_coef: float = 0.0,
        weighted_kl: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Loss [B] and gradient in float64, from predictions of the image, as in the paper's experiments."""
        v = self.output.double().requires_grad_()
        old, x0, noise = self.old.double(), self.image.double(), self.noise.double()
        losses = []
        for b in range(BATCH):
            t = float(SIGMA[b])
            xt = (1 - t) * x0[b] + t * noise[b]
            dim = self.channel_dim - 1 if self.channel_dim > 0 else self.channel_dim
            kept = torch.ones_like(xt.select(dim, 0), dtype=torch.bool) if mask is None else mask[b]
            weight = (torch.ones_like(kept, dtype=torch.float64) if weights is None else weights[b].double())[kept]
            r = (self.advantages[b].double().clamp(-advantage_clip, advantage_clip) / advantage_clip) / 2 + 0.5
            loss = torch.zeros((), dtype=torch.float64, device=v.device)
            positive = beta * v[b] + (1 - beta) * old[b]
            negative = (1 + beta) * old[b] - beta * v[b]
            for share, prediction in ((r, positive), (1 - r, negative)):
                if adaptive:
                    error = (xt - t * prediction - x0[b]).movedim(dim, -1)[kept]  # [locations, C]
                    squared = error**2 / error.detach().abs().mean().clip(min=1e-5)
                else:
                    squared = (prediction - (noise - x0)[b]).movedim(dim, -1)[kept] ** 2
                loss = loss + share / beta * (weight * squared.mean(dim=1)).mean()
            loss = loss * advantage_clip * (1.0 if step_weights is None else step_weights[b].double())
            if ref_model_output is not None:
                squared = ((v[b] - ref_model_output[b].double()) ** 2).movedim(dim, -1)[kept].mean(dim=1)
                loss = loss + kl_coef * ((weight * squared).mean() if weighted_kl else squared.mean())
            losses.append(loss)
        loss = torch.stack(losses)
        return loss.detach(), torch.autograd.grad(loss.mean(), v)[0]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.1, 2.5])
def test_no_weights_give_diffusion_nft(beta: float, adaptive: bool, policy_backend: tuple[str, str]) -> None:
    batch = Batch(policy_backend)
    exact_loss, exact_gradient = batch.published(beta=beta, adaptive=adaptive)
    loss, gradient, metrics = batch.run(beta=beta, adaptive=adaptive)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact_loss.mean()), rel=1e-6)
    close(gradient, exact_gradient, 1e-6)
    assert torch.equal(metrics["policy_loss"], loss)
    assert metrics["kl_loss"] == 0


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_the_written_objective_under_every_option(
    layout: str, adaptive: bool, policy_backend: tuple[str, str], poisoned: None
) -> None:
    batch = Batch(policy_backend, layout)
    options = {**batch.options(), "beta": 0.5, "adaptive": adaptive}
    exact_loss, exact_gradient = batch.published(**options)
    loss, gradient, metrics = batch.run(**options)
    assert float(loss) == pytest.approx(float(exact_loss.mean()), rel=2e-6)
    close(gradient, exact_gradient, 2e-6)
    each, same_gradient, same_metrics = batch.run(
        torch.full_like(exact_loss, 1 / BATCH).float(), reduction="none", **options
    )
    torch.testing.assert_close(each.double(), exact_loss, rtol=2e-6, atol=0)
    close(same_gradient, exact_gradient, 2e-6)
    assert all(torch.equal(metrics[name], same_metrics[name]) for name in metrics)


@pytest.mark.parametrize("option", ["weights", "mask", "step_weights", "ref_model_output"])
def test_each_option_alone(option: str, policy_backend: tuple[str, str]) -> None:
    batch = Batch(policy_backend, "packed")
    options = {option: batch.options()[option]} | ({"kl_coef": 0.1} if option == "ref_model_output" else {})
    exact_loss, exact_gradient = batch.published(**options)
    loss, gradient, _ = batch.run(**options)
    assert float(loss) == pytest.approx(float(exact_loss.mean()), rel=2e-6)
    close(gradient, exact_gradient, 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uniform_weights_equal_no_weights_bit_by_bit(layout: str, policy_backend: tuple[str, str]) -> None:
    batch = Batch(policy_backend, layout)
    ones = torch.ones(BATCH, *locations(*LAYOUTS[layout]), device=policy_backend[1])
    loss, gradient, _ = batch.run()
    same_loss, same_gradient, _ = batch.run(weights=ones)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)


@pytest.mark.parametrize(("layout", "grid"), [("image", [12, 10]), ("video", [3, 6, 7])])
def test_weights_on_a_patch_grid_equal_the_upsampled_ones(
    policy_backend: tuple[str, str], layout: str, grid: list[int]
) -> None:
    batch = Batch(policy_backend, layout)
    coarse = patch_weights(make(policy_backend, layout), grid)
    found = [batch.run(weights=w) for w in (coarse, upsampled(coarse, locations(*LAYOUTS[layout])))]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_metrics_are_what_they_say(policy_backend: tuple[str, str]) -> None:
    batch = Batch(policy_backend)
    _, _, metrics = batch.run(beta=0.5, adaptive=False, ref_model_output=batch.reference, kl_coef=0.1)
    v, old, target = batch.output.double(), batch.old.double(), batch.target.double()
    expected = {
        "positive_loss": (old + 0.5 * (v - old) - target).square().mean(),
        "negative_loss": (old - 0.5 * (v - old) - target).square().mean(),
        "deviation": (v - old).square().mean(),
        "policy_loss": batch.published(beta=0.5, adaptive=False)[0].mean(),
        "kl_loss": (v - batch.reference.double()).square().mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].shape == ()
        assert not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name].double(), value, rtol=2e-6, atol=0)


def test_the_least_error_keeps_the_loss_of_a_perfect_model_finite(policy_backend: tuple[str, str]) -> None:
    batch = Batch(policy_backend, drift=0.0)
    batch.old = batch.output = batch.target.clone()
    loss, gradient, _ = batch.run()
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("layout", ["image_odd", "packed", "packed_wide", "video"])
def test_whatever_lies_under_the_mask_reaches_nothing(layout: str, policy_backend: tuple[str, str]) -> None:
    batch = Batch(policy_backend, layout)
    options = batch.options()
    loss, gradient, metrics = batch.run(**options)
    dropped = ~options["mask"].unsqueeze(batch.channel_dim if batch.channel_dim > 0 else options["mask"].ndim)
    for name in ("output", "old", "target"):
        setattr(batch, name, getattr(batch, name).masked_fill(dropped, torch.nan))
    options["ref_model_output"] = options["ref_model_output"].masked_fill(dropped, torch.nan)
    same_loss, same_gradient, same_metrics = batch.run(**options)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)
    assert not gradient.masked_select(dropped.expand_as(gradient)).any()
    assert all(torch.equal(metrics[name], same_metrics[name]) for name in metrics)


@pytest.mark.parametrize("name", ["output", "old", "target"])
def test_nan_in_one_sample_stays_visible_and_out_of_the_others_gradients(
    name: str, policy_backend: tuple[str, str]
) -> None:
    batch = Batch(policy_backend)
    _, clean, _ = batch.run()
    broken = getattr(batch, name).clone()
    broken[1].view(-1)[5] = torch.nan
    setattr(batch, name, broken)
    loss, gradient, metrics = batch.run()
    assert loss.isnan()
    assert metrics["positive_loss"].isnan()
    assert bool(gradient[1].isnan().any())
    assert torch.equal(gradient[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["image", "packed", "video"])
def test_16_bit_outputs_give_a_gradient_with_one_rounding(
    layout: str, dtype: torch.dtype, policy_backend: tuple[str, str]
) -> None:
    batch = Batch(policy_backend, layout)
    batch.output, batch.old = batch.output.to(dtype), batch.old.to(dtype)
    options = {"weights": batch.options()["weights"]}
    _, exact_gradient = batch.published(**options)
    upstream = 2.0**14  # keeps float16 in range
    _, gradient, _ = batch.run(torch.tensor(upstream, device=policy_backend[1]), **options)
    assert gradient.dtype == dtype
    error = (gradient.double() / upstream - exact_gradient).abs()
    allowed = 0.51 * torch.finfo(dtype).eps * exact_gradient.abs() + 1e-5 * exact_gradient.abs().max()
    assert bool((error <= allowed).all())


def test_the_gradient_goes_to_model_output_alone(policy_backend: tuple[str, str]) -> None:
    batch = Batch(policy_backend)
    leaves = [t.clone().requires_grad_() for t in (batch.output, batch.old, batch.target, batch.advantages)]
    weighted_nft_loss(*leaves, batch.sigma, backend=policy_backend[0]).loss.backward()
    assert leaves[0].grad is not None
    assert [t.grad for t in leaves[1:]] == [None] * 3


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_gradcheck_of_the_reference(beta: float) -> None:
    output, old, target = torch.randn(3, BATCH, 3, 2, 2, dtype=torch.float64)
    advantages, sigma = torch.randn(BATCH, dtype=torch.float64), SIGMA.double()
    mask = torch.rand(BATCH, 2, 2) < 0.7
    mask[:, 0, 0] = True
    options = {"weights": torch.rand(BATCH, 2, 2, dtype=torch.float64), "mask": mask, "beta": beta,
               "ref_model_output": old, "kl_coef": 0.2}  # fmt: skip

    def loss(output: Tensor) -> Tensor:  # with ``adaptive`` the divisor has no gradient on purpose
        return weighted_nft_loss(
            output, old, target, advantages, sigma, adaptive=False, reduction="none", **options
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, output.requires_grad_())
