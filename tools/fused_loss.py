"""Whether the CUDA kernels that write a loss and its gradient in one launch are right, and how fast each shape of their
launch is: python -m tools.fused_loss

A shape of a launch is the largest number of blocks of a cluster and of threads of a block. Each is first compared with
the reference, with two launches (the shape "0") and with itself. Then launches are counted by the profiler, and all
shapes are timed side by side with two launches, torch.compile and a copy: three latents read and one written.
The exit status is 1 if a shape is wrong or takes more launches than expected; times do not change it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts.policy import LARGE_SHAPE, SHAPE, check_equal
from benchmarks.reporting import environment, tables
from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Times, Variant, interleave
from benchmarks.variants.policy import ADVANTAGE_CLIP, CLIP_RANGE, Inputs, make_inputs, variants
from star_kernels import PolicyLoss, native, weighted_nft_loss, weighted_policy_loss
from tools.gpu_smoke import other_policy_checks, policy_checks, run_group

SHAPES = ("16x256", "16x512", "8x256", "8x512")  # the first one is the default
TWO = "0"
F32, BF16 = torch.float32, torch.bfloat16
TIMED = [(SHAPE, F32), (SHAPE, BF16), (LARGE_SHAPE, F32), (LARGE_SHAPE, BF16)]
TOLERANCES = {F32: 1e-6, BF16: 2**-8}  # relative RMS difference between one launch and two
Loss = Callable[[Inputs], PolicyLoss]


def launched(shape: str) -> Any:
    """The context in which the loss has launches of a shape."""
    return patch.dict(os.environ, {"STAR_KERNELS_FUSED": shape})


def plain_loss(x: Inputs) -> PolicyLoss:
    return weighted_policy_loss(
        x.model_output, x.sample, x.prev_sample, x.old_log_prob, x.advantages, x.transition,
        clip_range=CLIP_RANGE, advantage_clip=ADVANTAGE_CLIP,
    )  # fmt: skip


def full_loss(x: Inputs, ratio: str = "sample", phrases: int = 0, dense: bool = False) -> PolicyLoss:
    """With weights, a mask, the KL penalty and GRPO-Guard."""
    advantages, weights = x.advantages, x.weights
    if phrases:
        advantages = x.advantages[:, None] * torch.linspace(-1, 1, phrases, device=x.advantages.device)
        weights = x.weights[:, None].expand(-1, phrases, -1, -1).contiguous()
    elif dense:
        advantages = x.advantages[:, None, None] * torch.sign(x.sample[:, 0])
    return weighted_policy_loss(
        x.model_output, x.sample, x.prev_sample, x.old_log_prob, advantages, x.transition, weights=weights,
        ratio=ratio, clip_range=0.5, mask=x.sample[:, 0] > -1, ref_model_output=x.model_output.detach().roll(1),
        kl_coef=0.1, old_model_output=x.model_output.detach().roll(1, 0),
    )  # fmt: skip


def nft_loss(x: Inputs) -> PolicyLoss:
    old, target = x.model_output.detach().roll(1), x.sample
    return weighted_nft_loss(
        x.model_output, old, target, x.advantages, x.sigma, weights=x.weights, ref_model_output=old, kl_coef=0.1
    )


LOSSES: dict[str, Loss] = {
    "no options": plain_loss,
    "every option": full_loss,
    "one ratio per location": partial(full_loss, ratio="location"),
    "4 phrases": partial(full_loss, phrases=4),
    "dense advantages": partial(full_loss, dense=True),
    "dense advantages, one ratio per location": partial(full_loss, dense=True, ratio="location"),
    "NFT": nft_loss,
}


def results_of(loss: Loss, x: Inputs) -> dict[str, Tensor]:
    found = loss(x)
    (gradient,) = torch.autograd.grad(found.loss, x.model_output)
    return {"loss": found.loss.detach(), "metrics": torch.stack(list(found.metrics.values())), "gradient": gradient}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative RMS difference; infinite where one has a NaN."""
    largest = 0.0
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        largest = max(largest, float(error.nan_to_num(torch.inf)))
    return largest


def wrong(shape: str, inputs: list[Inputs]) -> list[str]:
    """What a shape of the launch gets wrong: beside the reference, beside two launches, beside itself."""
    print(f"-- launches of {shape}", flush=True)
    problems = []
    with launched(shape):
        for checks in (policy_checks, other_policy_checks):
            if run_group(checks("cuda", "native"), "cuda"):
                problems.append(f"{shape} differs from the reference")
        for x in inputs:
            check_equal(x)
    for x in inputs:
        dtype = x.model_output.dtype
        for name, loss in LOSSES.items():
            with launched(TWO):
                expected = results_of(loss, x)
            with launched(shape):
                found, again = results_of(loss, x), results_of(loss, x)
            error = difference(found, expected)
            if not error <= TOLERANCES[dtype]:
                problems.append(f"{shape}, {name}, {dtype}: differs from two launches by {error:.1e}")
            if any(not torch.equal(found[key], again[key]) for key in found):
                problems.append(f"{shape}, {name}, {dtype}: two runs differ")
    return problems


class Boundary(torch.autograd.Function):
    """The tensor itself, whose gradient ends here. A leaf would add the gradient of each call to that of the last."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def step(x: Inputs, shape: str, through: str) -> None:
    """Forward and backward through PolicyLoss.backward, or through the backward of the loss's tensor."""
    with launched(shape):
        result = plain_loss(x)
        if through == "PolicyLoss":
            result.backward()
        else:
            result.loss.backward()


def launches(run: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]


def miscounted(x: Inputs, shape: str) -> list[str]:
    """The launches that are not as expected: one, and one more that keeps the gradient besides PyTorch's ones."""
    problems = []
    for through, expected in (("PolicyLoss", 1), ("loss", 2)):
        names = launches(partial(step, x, shape, through))
        own = sum("policy_" in name for name in names)
        print(f"{shape}, {through}.backward: {own} launches of ours, {len(names)} in all: {', '.join(names)}"[:300])
        if own != expected or len(names) > own + expected - 1:
            problems.append(f"{shape}, {through}.backward: {own} launches of ours, {len(names)} in all")
    return problems


def measure(x: Inputs, budget: Budget) -> dict[str, Any]:
    """Device times of all shapes, of two launches, of torch.compile and of a copy."""
    tensors = (x.model_output, x.sample, x.prev_sample, x.model_output)  # three read, one written
    moved = sum(t.nbytes for t in tensors)
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=x.sample.device)
    target = torch.empty_like(source)
    inner = replace(x, model_output=Boundary.apply(x.model_output))
    found = [Variant("copy", "copy of the same number of bytes", lambda: target.copy_(source))]
    for through in ("PolicyLoss", "loss"):
        for shape in (*SHAPES, TWO):
            label = f"{through}.backward, {'two launches' if shape == TWO else shape}"
            found.append(Variant(f"{through} {shape}", label, partial(step, inner, shape, through)))
    found.append(replace(variants(x)[-1], name="compiled"))
    dtype = str(x.model_output.dtype).removeprefix("torch.")
    title = f"{'x'.join(map(str, x.model_output.shape))} {dtype}"
    clock = kernel_clock(x.sample.device)
    times = interleave(found, clock, budget, title, warm_up=5)
    print(f"{title}: {summary(times, moved)}", flush=True)
    return {"title": title, "clock": clock.name, "bytes_moved": moved, **times.columns(found, "compiled")}


def summary(times: Times, moved: int) -> str:
    """Microseconds of all variants, and the share of the copy's bandwidth of the fastest shape."""
    fastest = times.fastest([f"PolicyLoss {shape}" for shape in SHAPES])
    figures = " | ".join(f"{name} {1e6 * times.figure(name).median:.1f}" for name in times.names)
    share = times.ratio("copy", fastest).median
    bandwidth = moved / times.figure(fastest).median / 1e12
    return f"{figures} us; fastest {fastest}: {share:.2f} of the copy's bandwidth, {bandwidth:.2f} TB/s"


def run(out: Path, seconds: float, batch: int | None) -> int:
    device = torch.device("cuda")

    def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
        sizes: Any = (batch or shape[0], *shape[1:])
        return make_inputs(sizes, dtype, device)

    checked = [inputs(SHAPE, F32), inputs(SHAPE, BF16)]
    problems = [problem for shape in SHAPES for problem in wrong(shape, checked)]
    inner = replace(checked[0], model_output=Boundary.apply(checked[0].model_output))
    problems += [problem for shape in SHAPES for problem in miscounted(inner, shape)]
    for problem in problems:
        print(f"FAILED: {problem}", flush=True)
    cases = []
    for shape, dtype in TIMED if seconds > 0 else []:
        cases.append(measure(inputs(shape, dtype), Budget(rounds=1000, seconds=seconds / len(TIMED))))
    described = environment.describe(device)
    out.mkdir(parents=True, exist_ok=True)
    result = {"environment": described, "problems": problems, "cases": cases}
    tables.write_json(out / f"fused-{environment.slug(described)}.json", result)
    return int(bool(problems))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fused_loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fused"), help="output folder (default: runs/fused)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time of all timings; 0 checks only (default: 20)")
    parser.add_argument("--batch", type=int, help="batch of all problems")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"no GPU that torch {torch.__version__} can use")
    if native.cuda() is None:
        parser.error(f"no CUDA library: {native.problem('cuda')}")
    return run(options.out, options.seconds, options.batch)


if __name__ == "__main__":
    sys.exit(main())
