"""The time and the peak memory of the policy loss, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts.request import Request
from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Variant, interleave
from benchmarks.timing.memory import peak_memory, settle_allocator
from benchmarks.timing.progress import Progress
from benchmarks.variants.policy import Inputs, flow_grpo, make_inputs, ours, variants

SHAPE = (8, 16, 64, 64)
LARGE_SHAPE = (64, 16, 128, 128)  # bandwidth-bound on a GPU
QUICK_SHAPE = (2, 16, 16, 16)
# float32: the sums are in another order. 16 bits: the gradient is rounded once, so the last bit may differ.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}

MEMORY = {
    "ours": ("memory_over_gradient", "peak extra memory / one gradient: ours, no weights"),
    "ours_weighted": ("memory_over_gradient_weighted", "peak extra memory / one gradient: ours, weights"),
    "eager": ("memory_over_gradient_eager", "peak extra memory / one gradient: eager"),
}


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one case for each dtype. On a CPU a default run measures only float32, because compilation is slow."""
    device, dtypes, batch, budget, extent = request
    shape = QUICK_SHAPE if extent == "quick" else SHAPE
    if batch:
        shape = (batch, *shape[1:])
    settle_allocator(device)
    name = "smoke test" if extent == "quick" else "policy loss"
    short = extent == "default" and device.type == "cpu"
    usual = dtypes or ([torch.float32] if short else [torch.float32, torch.bfloat16])
    large = (dtypes or [torch.float32]) if device.type == "cuda" and extent != "quick" else []
    left = len(usual) + len(large)
    for dtype in usual:
        yield measure_case(name, shape, dtype, device, budget.for_next(left))
        left -= 1
    for dtype in large:
        yield measure_bandwidth(LARGE_SHAPE, dtype, device, budget.for_next(left))
        left -= 1


def measure_case(
    case: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, budget: Budget
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    title = f"policy loss · {name}"
    inputs = make_inputs(shape, dtype, device)
    errors = check_equal(inputs)
    found, problem = variants(inputs), ""
    with Progress(f"{title} · torch.compile", 0) as progress:
        progress.show("compiling")
        try:
            found[-1].run()
        except Exception as error:  # no compiler on this machine; the thresholds on its ratio stay undecided
            found, problem = found[:-1], type(error).__name__
    clock = kernel_clock(device)
    times = interleave(found, clock, budget, title, warm_up=10)
    gradient_bytes = inputs.model_output.numel() * inputs.model_output.element_size()
    ratios = {f"{v.name}_over_ours": (f"{v.label} / ours, no weights", v.name, "ours") for v in found[1:]}
    ratios |= {
        f"{v.name}_over_ours_weighted": (f"{v.label} / ours, weights", v.name, "ours_weighted") for v in found[2:]
    }
    if not problem:
        directly = ("Flow-GRPO arithmetic, torch.compile / ours, PolicyLoss.backward", "compiled", "ours_directly")
        ratios["compiled_over_ours_directly"] = directly
    memory = {v.name: peak_memory(v.run, device) / gradient_bytes for v in found[:3]}
    problem = f"torch.compile failed with {problem}" if problem else ""
    calls = {}
    if device.type == "cuda":
        calls = device_calls(found[0].run, "", "") | device_calls(found[3].run, "_directly", ", PolicyLoss.backward")
    return {
        "name": case,
        "title": f"batch {shape[0]} of {'x'.join(map(str, shape[1:]))}, {name} model output, forward and backward",
        "shape": list(shape),
        "dtype": name,
        "clock": clock.name,
        **times.columns(found, "ours"),
        "ratios": {
            **times.ratios(ratios),
            **{MEMORY[key][0]: {"label": MEMORY[key][1], "median": value} for key, value in memory.items()},
            **calls,
        },
        "gradient_bytes": gradient_bytes,
        "differences": errors,
        "notes": [*filter(None, (problem, times.note))],
    }


def measure_bandwidth(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, budget: Budget
) -> dict[str, Any]:
    """Compares our loss with a copy of the same number of bytes: three latents read twice and one gradient written."""
    name = str(dtype).removeprefix("torch.")
    inputs = make_inputs(shape, dtype, device)
    latents = (inputs.model_output, inputs.sample, inputs.prev_sample)
    moved = 2 * sum(t.nbytes for t in latents) + inputs.model_output.nbytes
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = [
        Variant("ours", "ours, no weights", lambda: ours(inputs, None)),
        Variant("copy", "copy of the same number of bytes", lambda: target.copy_(source)),
    ]
    clock = kernel_clock(device)
    times = interleave(found, clock, budget, f"policy loss, bandwidth · {name}", warm_up=3)
    label = "copy / ours (share of the copy's bandwidth)"
    return {
        "name": "policy loss, large",
        "title": f"batch {shape[0]} of {'x'.join(map(str, shape[1:]))}, {name} model output, forward and backward",
        "shape": list(shape),
        "dtype": name,
        "clock": clock.name,
        **times.columns(found, "copy"),
        "bytes_moved": moved,
        "ratios": {"copy_over_ours": {"label": label, **times.ratio("copy", "ours").as_dict()}},
        "notes": [*filter(None, (times.note,))],
    }


def device_calls(run: Any, suffix: str, label: str) -> dict[str, dict[str, Any]]:
    """Kernel launches and device synchronisations of one forward and backward pass, counted by the profiler."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    names = [event.name() for event in profiler.profiler.kineto_results.events()]
    launches = sum("LaunchKernel" in name for name in names)
    waits = sum("Synchronize" in name for name in names) - 1  # without the profiler's own at its end
    return {
        f"launches{suffix}": {"label": f"kernel launches, forward and backward{label}", "median": launches},
        f"synchronisations{suffix}": {
            "label": f"device synchronisations, forward and backward{label}",
            "median": max(0, waits),
        },
    }


def check_equal(x: Inputs) -> dict[str, float]:
    """Checks our loss and gradient, without weights and with uniform weights, against the eager arithmetic.

    Raises:
        RuntimeError: if they differ, or if a sample is clipped.
    """
    expected_loss, expected, metrics = flow_grpo(x, x.old_log_prob_mean)
    if float(metrics["clip_fraction"]) > 0:
        raise RuntimeError("a sample is clipped, so its gradient would not be computed")
    tolerance = TOLERANCES[x.model_output.dtype]
    differences = {}
    for name, weights in (("ours", None), ("ours_weighted", torch.ones_like(x.weights))):
        loss, gradient, _ = ours(x, weights)
        scale = x.advantages.abs().mean()  # size of the terms that cancel in the loss
        differences[f"{name}_loss"] = float((loss - expected_loss).detach().abs() / scale)
        differences[f"{name}_gradient"] = _relative_rms(gradient, expected)
        worst = max(differences[f"{name}_loss"] / 1e-5, differences[f"{name}_gradient"] / tolerance)
        if not worst <= 1:
            raise RuntimeError(
                f"our loss and the eager arithmetic differ: {differences}, tolerance {tolerance:.0e} for the gradient"
            )
    return differences


def _relative_rms(value: Tensor, expected: Tensor) -> float:
    value, expected = value.float(), expected.float()
    return float((value - expected).square().mean().sqrt() / expected.square().mean().sqrt())
