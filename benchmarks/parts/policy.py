"""Part (b): the policy loss, forward and backward, and the memory it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Extent, Variant, interleave
from benchmarks.timing.progress import Progress
from benchmarks.variants.policy import Inputs, flow_grpo, make_inputs, ours, variants

SHAPE = (8, 16, 64, 64)
LARGE_SHAPE = (64, 16, 128, 128)  # bound by memory, on a GPU
QUICK_SHAPE = (2, 16, 16, 16)
# float32: the same sums in another order. 16 bits: the gradient is rounded once, so a last bit may differ.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}

MEMORY = {
    "ours": ("memory_over_gradient", "peak extra memory / one gradient: ours, no weights"),
    "ours_weighted": ("memory_over_gradient_weighted", "peak extra memory / one gradient: ours, weights"),
    "eager": ("memory_over_gradient_eager", "peak extra memory / one gradient: eager"),
}


def measure(
    device: torch.device, dtypes: list[torch.dtype] | None, batch: int | None, budget: Budget, extent: Extent
) -> Iterator[dict[str, Any]]:
    """A case for each dtype; by default float32 alone on a CPU, where compiling the other arithmetic takes longest."""
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
        yield measure_case(name, shape, dtype, device, budget.for_one(left))
        left -= 1
    for dtype in large:
        yield measure_bandwidth(LARGE_SHAPE, dtype, device, budget.for_one(left))
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
        except Exception as error:  # no compiler on this machine: reported, and a threshold that cannot be met
            found, problem = found[:-1], type(error).__name__
    clock = kernel_clock(device)
    times = interleave(found, clock, budget, title, warm_up=10)
    gradient_bytes = inputs.model_output.numel() * inputs.model_output.element_size()
    ratios = {f"{v.name}_over_ours": (f"{v.label} / ours, no weights", v.name, "ours") for v in found[1:]}
    ratios |= {
        f"{v.name}_over_ours_weighted": (f"{v.label} / ours, weights", v.name, "ours_weighted") for v in found[2:]
    }
    memory = {v.name: peak_memory(v.run, device) / gradient_bytes for v in found[:3]}
    problem = f"torch.compile did not run: {problem}" if problem else ""
    calls = device_calls(found[0].run) if device.type == "cuda" else {}
    return {
        "name": case,
        "title": f"batch {shape[0]} of {'x'.join(map(str, shape[1:]))}, {name} model output, forward and backward",
        "shape": list(shape),
        "dtype": name,
        "clock": clock.name,
        **times.columns(found, "ours"),
        "ratios": {
            **{key: {"label": label, **times.ratio(a, b).as_dict()} for key, (label, a, b) in ratios.items()},
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
    """Ours against a plain copy that moves as many bytes: three latents read twice, and a gradient written."""
    name = str(dtype).removeprefix("torch.")
    inputs = make_inputs(shape, dtype, device)
    latents = (inputs.model_output, inputs.sample, inputs.prev_sample)
    moved = 2 * sum(t.nbytes for t in latents) + inputs.model_output.nbytes
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = [
        Variant("ours", "ours, no weights", lambda: ours(inputs, None)),
        Variant("copy", "a copy of as many bytes", lambda: target.copy_(source)),
    ]
    clock = kernel_clock(device)
    times = interleave(found, clock, budget, f"policy loss, bandwidth · {name}", warm_up=3)
    label = "time of the copy / ours: the share of its bandwidth"
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


def device_calls(run: Any) -> dict[str, dict[str, Any]]:
    """Kernel launches and waits for the device of one forward and backward pass, as the profiler sees them."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    names = [event.name() for event in profiler.profiler.kineto_results.events()]
    launches = sum("LaunchKernel" in name for name in names)
    waits = sum("Synchronize" in name for name in names) - 1  # the profiler's own, at its end
    return {
        "launches": {"label": "kernel launches, forward and backward", "median": launches},
        "synchronisations": {"label": "waits for the device, forward and backward", "median": max(0, waits)},
    }


def settle_allocator(device: torch.device) -> None:
    """Puts the C allocator in the state that it has in any training process.

    Before the first large tensor is freed, glibc gives every tensor of a few MB back to the system, and the page faults
    of the next one make eager PyTorch look several times slower than it is in a trainer.
    """
    if device.type == "cpu":
        torch.zeros(30 << 20, dtype=torch.uint8)


def check_equal(x: Inputs) -> dict[str, float]:
    """Ours without weights, ours with uniform weights and the eager arithmetic agree in loss and gradient."""
    expected_loss, expected, metrics = flow_grpo(x, x.old_log_prob_mean)
    if float(metrics["clip_fraction"]) > 0:
        raise RuntimeError("a sample is clipped, so its gradient would cost nothing")
    tolerance = TOLERANCES[x.model_output.dtype]
    differences = {}
    for name, weights in (("ours", None), ("ours_weighted", torch.ones_like(x.weights))):
        loss, gradient, _ = ours(x, weights)
        scale = x.advantages.abs().mean()  # of the terms that cancel in the loss
        differences[f"{name}_loss"] = float((loss - expected_loss).detach().abs() / scale)
        differences[f"{name}_gradient"] = _relative_rms(gradient, expected)
        worst = max(differences[f"{name}_loss"] / 1e-5, differences[f"{name}_gradient"] / tolerance)
        if not worst <= 1:
            raise RuntimeError(f"ours and the eager arithmetic differ: {differences}, tolerance {tolerance:.0e}")
    return differences


def peak_memory(run: Any, device: torch.device) -> int:
    """Bytes that PyTorch's allocator held at most during a call, beyond what it held before.

    The result counts, as the gradient does. What compiled code takes outside PyTorch's allocator is not seen.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()  # kept: a result freed inside the profile would count the same, its free is just not needed
    del kept
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _relative_rms(value: Tensor, expected: Tensor) -> float:
    value, expected = value.float(), expected.float()
    return float((value - expected).square().mean().sqrt() / expected.square().mean().sqrt())
