"""Random calls of the policy losses and of the sampling step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fuzzing.comparing import DTYPES, check, plain, wide
from fuzzing.memory import Draw
from torch import Tensor

from star_kernels import (
    Transition,
    dance_sde,
    flow_cps,
    flow_matching,
    flow_sde,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)
from star_kernels.policy import naive
from star_kernels.policy.arguments import SampleArguments


def latent_shape(draw: Draw) -> tuple[tuple[int, ...], int]:
    """A shape [B, ...] and the dimension of its channels."""
    ndim = draw.choice([3, 4, 4, 4, 5])
    if draw.chance(0.03):  # work for several threads
        return (4, 16, 40, 33), 1
    locations = [draw.size(6) for _ in range(ndim - 2)]
    locations[-1] = draw.choice([1, 2, 4, draw.randint(1, 70), draw.randint(1, 70)])
    if ndim == 3 and draw.chance(0.3):
        locations = [draw.randint(400, 1100)]  # more than a tile
    channels = draw.choice([1, 2, 3, 4, 7, 16, 16, 33])
    if draw.chance(0.05):
        channels, locations = draw.randint(1000, 1100), [1] * (ndim - 3) + [draw.randint(1, 4)]
    channel_dim = draw.choice([1, 1, ndim - 1, draw.randint(1, ndim - 1)])
    return (draw.randint(1, 4), *locations[: channel_dim - 1], channels, *locations[channel_dim - 1 :]), channel_dim


def some_transition(draw: Draw, batch: int) -> Transition:
    columns = draw.choice([1, batch])
    sigma = 0.2 + 0.75 * draw.uniform_tensor(columns)
    following = sigma * (0.3 + 0.5 * draw.uniform_tensor(columns))
    kind = draw.choice(["flow_sde", "flow_cps", "dance_sde", "flow_matching"])
    if kind == "flow_sde":
        made = flow_sde(sigma, following, noise_level=draw.uniform(0.4, 1), sigma_max=0.97)
    elif kind == "flow_cps":
        made = flow_cps(sigma, following, noise_level=draw.uniform(0.4, 1))
    elif kind == "dance_sde":
        made = dance_sde(sigma, following, eta=draw.uniform(0.3, 1))
    else:
        made = flow_matching(sigma, weight=draw.uniform(0.5, 2))
    return Transition(draw.place("transition", made.coefficients, expands=False))


def some_options(draw: Draw, shape: tuple[int, ...], channel_dim: int, output: Tensor) -> dict[str, Any]:
    """Options that every objective accepts."""
    batch, locations = shape[0], [n for d, n in enumerate(shape) if d not in (0, channel_dim)]
    options: dict[str, Any] = {"channel_dim": draw.choice([channel_dim, channel_dim - len(shape)])}
    if draw.chance(0.6):
        coarser = [draw.choice([n, draw.choice([k for k in range(1, n + 1) if n % k == 0])]) for n in locations]
        grid = locations if len(locations) == 1 else coarser
        values = draw.uniform_tensor(batch, *grid) * (draw.uniform_tensor(batch, *grid) < draw.choice([0.5, 1.0]))
        options["weights"] = draw.place("weights", 2 * values)
    if draw.chance(0.3):
        mask = draw.uniform_tensor(batch, *locations) < draw.choice([0.2, 0.8])
        mask.flatten(1)[torch.arange(batch), draw.randrange(math.prod(locations))] = True
        options["mask"] = draw.place("mask", mask, expands=False)
    if draw.chance(0.3):
        options["step_weights"] = draw.place("step_weights", 0.5 + draw.uniform_tensor(batch))
    if draw.chance(0.4):
        reference = draw.place("ref_model_output", (output + 0.1 * draw.normal(*shape)).to(draw.choice(DTYPES)))
        options["ref_model_output"] = draw.choice([reference, reference, output])
        options["kl_coef"] = draw.choice([0.0, 0.04, 1.0])
        options["weighted_kl"] = draw.chance(0.5)
    options["reduction"] = draw.choice(["mean", "none"])
    options["advantage_clip"] = draw.choice([5.0, 0.5, 1])
    return options


def compare_objectives(
    draw: Draw, function: Callable[..., Any], arguments: dict[str, Any], margins: list[dict[str, Any]]
) -> None:
    """Loss, metrics and gradient; ``margins`` are options on either side of those given, to find jumps by."""
    upstream = draw.place("grad_loss", draw.normal(len(arguments["model_output"])), expands=False)
    upstream = upstream if arguments["reduction"] == "none" else upstream[0]

    def run(backend: str, convert: Callable[[Any], Any], **changed: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaf = convert(arguments["model_output"]).detach().requires_grad_()
        others = {k: convert(v) for k, v in arguments.items() if k != "model_output"}
        loss, metrics = function(leaf, **{**others, **changed, "backend": backend})
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
        return loss.detach(), gradient, metrics

    loss, gradient, metrics = run("native", lambda value: value)
    eager, exact = run("naive", plain), run("naive", wide)
    assert loss.dtype == torch.float32
    assert gradient.dtype == arguments["model_output"].dtype
    check("loss", loss, eager[0], exact[0], least=1.0)
    around = [run("naive", wide, **margin) for margin in margins]
    size = float(exact[1].abs().max())
    jumps = [(g - exact[1]).abs() > 1e-3 * size for _, g, _ in around]
    ignored = torch.stack(jumps).any(dim=0) if jumps else None
    check("gradient", gradient, eager[1], exact[1], least=1e-4, ignored=ignored)  # of terms that may cancel
    for name, metric in metrics.items():
        if name == "clip_fraction":
            found = [float(m[name]) for *_, m in around]
            assert min(found) - 1e-6 <= float(metric) <= max(found) + 1e-6, "clip_fraction"
        else:
            check(name, metric, eager[2][name], exact[2][name], least=1.0)


def policy_arguments(draw: Draw) -> dict[str, Any]:
    shape, channel_dim = latent_shape(draw)
    batch, dtypes = shape[0], [draw.choice(DTYPES) for _ in range(4)]
    output = draw.place("model_output", draw.normal(*shape).to(dtypes[0]))
    old = draw.place("old_model_output", (output + draw.choice([0.0, 0.01, 0.05]) * draw.normal(*shape)).to(dtypes[1]))
    sample = output if draw.chance(0.1) else draw.place("sample", draw.normal(*shape).to(dtypes[2]))
    transition = some_transition(draw, batch)
    noise = draw.normal(*shape)
    drawn, _ = naive.sample_transition(SampleArguments(old, sample, noise, transition.coefficients, channel_dim))
    prev = sample if draw.chance(0.05) else draw.place("prev_sample", drawn.to(dtypes[3]))
    options = some_options(draw, shape, channel_dim, output)
    options["ratio"] = draw.choice(["sample", "location"])
    options["clip_range"] = draw.choice([1e-4, 0.02, 0.5, (0.1, 0.3), (0.05, 0.2), 1])
    if draw.chance(0.3):
        options["old_model_output"] = draw.choice([old, output])
    log_prob = naive.log_prob(old, sample, prev, transition.coefficients, channel_dim)
    if "weights" not in options and options["ratio"] == "sample" and draw.chance(0.5):
        log_prob = naive.location_mean(log_prob, options.get("mask"))
    return {
        "model_output": output,
        "sample": sample,
        "prev_sample": prev,
        "old_log_prob": draw.place("old_log_prob", log_prob, expands=False),
        "advantages": some_advantages(draw, shape, channel_dim, options),
        "transition": transition,
        **options,
    }


def some_advantages(draw: Draw, shape: tuple[int, ...], channel_dim: int, options: dict[str, Any]) -> Tensor:
    """Those of samples, of locations, or of phrases, whose weights then take the place of those in ``options``."""
    batch, locations = shape[0], [n for d, n in enumerate(shape) if d not in (0, channel_dim)]
    size: list[int] = draw.choice([[], [], locations])
    if "weights" in options and draw.chance(0.3):
        phrases = draw.randint(1, 5)
        grid = options["weights"].shape[1:]
        options["weights"] = draw.place("weights", 2 * draw.uniform_tensor(batch, phrases, *grid))
        options.pop("weighted_kl", None)
        size = [phrases]
    return draw.place("advantages", draw.choice([0.0, 1.0, 3.0]) * draw.normal(batch, *size))


def policy(draw: Draw) -> None:
    arguments = policy_arguments(draw)
    low, high = arguments["clip_range"] if isinstance(arguments["clip_range"], tuple) else [arguments["clip_range"]] * 2
    margins = [{"clip_range": (min(1.0, max(0.0, low + step)), max(0.0, high + step))} for step in (-1e-4, 1e-4)]
    compare_objectives(draw, weighted_policy_loss, arguments, margins)


def nft_arguments(draw: Draw) -> dict[str, Any]:
    shape, channel_dim = latent_shape(draw)
    batch = shape[0]
    output = draw.place("model_output", draw.normal(*shape).to(draw.choice(DTYPES)))
    old = draw.place("old_model_output", (output + 0.05 * draw.normal(*shape)).to(draw.choice(DTYPES)))
    target = draw.place("target", (old + 0.5 * draw.normal(*shape)).to(draw.choice(DTYPES)))
    return {
        "model_output": output,
        "old_model_output": output if draw.chance(0.1) else old,
        "target": old if draw.chance(0.05) else target,
        "advantages": draw.place("advantages", draw.choice([0.0, 1.0, 3.0]) * draw.normal(batch)),
        "sigma": draw.place("sigma", draw.uniform_tensor(batch)),
        "beta": draw.choice([1, 0.1, 2.5]),
        "adaptive": draw.chance(0.5),
        **some_options(draw, shape, channel_dim, output),
    }


def nft(draw: Draw) -> None:
    compare_objectives(draw, weighted_nft_loss, nft_arguments(draw), [])


def sampling_arguments(draw: Draw) -> dict[str, Any]:
    shape, channel_dim = latent_shape(draw)
    output = draw.place("model_output", draw.normal(*shape).to(draw.choice(DTYPES)))
    sample = output if draw.chance(0.1) else draw.place("sample", draw.normal(*shape).to(draw.choice(DTYPES)))
    noise = sample if draw.chance(0.05) else draw.place("noise", draw.normal(*shape).to(draw.choice(DTYPES)))
    dim = draw.choice([channel_dim, channel_dim - len(shape)])
    transition = some_transition(draw, shape[0])
    return {"model_output": output, "sample": sample, "transition": transition, "noise": noise, "channel_dim": dim}


def sampling(draw: Draw) -> None:
    arguments = sampling_arguments(draw)
    prev, log_prob = sample_transition(**arguments, backend="native")
    results = [
        sample_transition(**{name: convert(value) for name, value in arguments.items()}, backend="naive")[0]
        for convert in (plain, wide)
    ]
    assert prev.dtype == arguments["sample"].dtype
    check("prev_sample", prev, *results)
    names, table = ("model_output", "sample"), arguments["transition"].coefficients
    dim = arguments["channel_dim"] % prev.ndim
    written = [
        naive.log_prob(*(convert(arguments[name]) for name in names), convert(prev), table, dim)
        for convert in (plain, wide)
    ]
    check("log_prob", log_prob, *written, least=1.0)
