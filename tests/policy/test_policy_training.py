"""The losses inside a trainer: activation checkpointing, gradient accumulation, mixed precision, several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from problems import BATCH, SIGMA, make
from tiers import mostly_exhaustive
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from star_kernels import sample_transition, weighted_nft_loss, weighted_policy_loss

OPTIONS = {"clip_range": 0.9}


def scene() -> tuple[nn.Module, tuple]:
    """A small model instead of a transformer, and one of its rollouts."""
    problem = make(("auto", "cpu"))
    torch.manual_seed(0)
    model = nn.Conv2d(16, 16, 3, padding=1)
    return model, problem.positional[1:]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, rollout = scene()
    sample = rollout[0].requires_grad_()  # what the reentrant kind needs

    def loss_of(sample: Tensor) -> Tensor:
        return weighted_policy_loss(model(sample), sample, *rollout[1:], **OPTIONS).loss

    expected = gradients(model, loss_of(sample))
    checkpoint(loss_of, sample, use_reentrant=reentrant).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_accumulate_over_parts_of_a_batch(reduction: str) -> None:
    model, (sample, prev, old, advantages, transition) = scene()
    whole = gradients(
        model, weighted_policy_loss(model(sample), sample, prev, old, advantages, transition, **OPTIONS)[0]
    )
    half = BATCH // 2
    for part in (slice(0, half), slice(half, BATCH)):
        piece = type(transition)(transition.coefficients[:, part])
        loss, _ = weighted_policy_loss(
            model(sample[part]), sample[part], prev[part], old[part], advantages[part], piece,
            reduction=reduction, **OPTIONS,
        )  # fmt: skip
        (loss / 2 if reduction == "mean" else loss.sum() / BATCH).backward()
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_reaches_the_model_and_not_the_loss(dtype: torch.dtype) -> None:
    model, (sample, *rest) = scene()
    with torch.autocast("cpu", dtype=dtype):
        output = model(sample)
        assert output.dtype == dtype
        loss, _ = weighted_policy_loss(output, sample, *rest, **OPTIONS)
        prev, log_prob = sample_transition(output, sample, rest[-1])
    outside, _ = weighted_policy_loss(output, sample, *rest, **OPTIONS)
    assert loss.dtype == log_prob.dtype == prev.dtype == torch.float32
    assert torch.equal(loss, outside)


def test_a_scaled_loss_gives_scaled_gradients() -> None:
    model, (sample, *rest) = scene()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(sample)
    wide = output.detach().float().requires_grad_()
    loss, _ = weighted_policy_loss(output, sample, *rest, **OPTIONS)
    expected, _ = weighted_policy_loss(wide, sample, *rest, **OPTIONS)
    (upstream,) = torch.autograd.grad(expected, wide)
    (scaled,) = torch.autograd.grad(scaler.scale(loss), output, retain_graph=True)
    torch.testing.assert_close(
        scaled.float() / 2.0**12, upstream, rtol=2**-10, atol=float(upstream.abs().max()) / 2**10
    )
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() >= 2.0**12  # nothing overflowed
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["policy", "nft"])
def test_a_second_derivative_is_an_error(name: str) -> None:
    _, (sample, prev, old, advantages, transition) = scene()
    leaf = torch.randn_like(sample).requires_grad_()
    if name == "policy":
        loss, _ = weighted_policy_loss(leaf, sample, prev, old, advantages, transition, **OPTIONS)
    else:
        loss, _ = weighted_nft_loss(leaf, sample, prev, advantages, SIGMA)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.sum().backward()


def test_using_a_freed_graph_again_is_an_error() -> None:
    _, (sample, *rest) = scene()
    leaf = torch.randn_like(sample).requires_grad_()
    loss, _ = weighted_policy_loss(leaf, sample, *rest, **OPTIONS)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("wrapper", mostly_exhaustive(["ddp", "fsdp"], ["ddp"]))
def test_two_processes_give_the_gradients_of_one(wrapper: str, tmp_path: Path) -> None:
    file = tmp_path / "meeting"
    workers = [
        subprocess.Popen(
            [sys.executable, distributed_worker.__file__, str(rank), str(file), wrapper],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    model = distributed_worker.model()
    expected = gradients(model, distributed_worker.loss_of(model, slice(None)).loss)
    for got, gradient in zip(torch.load(f"{file}.pt"), expected, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-7)
