"""Random calls with one bad argument, which a TypeError or a ValueError must name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fuzzing.allocation import allocation_arguments
from fuzzing.attention import maps_arguments, whole_arguments
from fuzzing.memory import Draw
from fuzzing.policy import nft_arguments, policy_arguments, sampling_arguments
from torch import Tensor

from star_kernels import (
    TokenSelection,
    Transition,
    allocate,
    attention,
    attention_maps,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)

CALLS: dict[str, tuple[Callable[..., Any], Callable[[Draw], dict[str, Any]]]] = {
    "policy": (weighted_policy_loss, policy_arguments),
    "nft": (weighted_nft_loss, nft_arguments),
    "sampling": (sample_transition, sampling_arguments),
    "maps": (attention_maps, maps_arguments),
    "attention": (attention, whole_arguments),
    "allocation": (allocate, allocation_arguments),
}
NOT_NUMBERS = ["large", None, [1.0]]
BAD_VALUES: dict[str, list[Any]] = {
    "channel_dim": [0, 7, -7, 1.5, None, "x"],
    "ratio": ["token", None, 3],
    "reduction": ["sum", None, 3],
    "clip_range": [-0.1, 1.5, math.nan, (0.1,), (0.1, -0.2), (2.0, 0.1), *NOT_NUMBERS],
    "advantage_clip": [0, -1.0, math.nan, *NOT_NUMBERS],
    "kl_coef": [-1, math.inf, math.nan, *NOT_NUMBERS],
    "beta": [0, -1.0, math.inf, math.nan, *NOT_NUMBERS],
    "weighted_kl": NOT_NUMBERS,
    "adaptive": NOT_NUMBERS,
    "backend": ["cuda", None, 3],
    "layout": ["sbhd", None, 3],
    "direction": ["both", None, 3],
    "reduce_heads": NOT_NUMBERS,
    "return_lse": NOT_NUMBERS,
    "scale": [math.nan, math.inf, "large", [1.0]],
    "rows": [(-1, 1), (0, 0), (0, 10_000), slice(10_000, None), slice(0, 5, 2), 3, "all", (0.0, 1)],
    "strength": [-0.1, 1.1, math.nan, *NOT_NUMBERS],
    "over": ["space", None, 3],
    "cap": [1.0, 0.0, -1, math.inf, math.nan, "large", [1.0]],
}
EVERY = {  # options that a case may not have drawn
    "policy": ("backend", "weighted_kl", "kl_coef"),
    "nft": ("backend", "weighted_kl", "kl_coef"),
    "sampling": ("backend",),
    "maps": ("backend",),
    "attention": ("backend", "return_lse"),
    "allocation": (),
}
OPTIONAL = {
    "weights",
    "mask",
    "step_weights",
    "ref_model_output",
    "old_model_output",
    "noise",
    "key_mask",
    "rows",
    "step_signal",
}
SETS_THE_SHAPE = {"model_output", "query", "maps"}


def spoilt(draw: Draw, operation: str, name: str, value: Any) -> Any:
    """A value that the argument must not have."""
    if name in BAD_VALUES:
        return draw.choice(BAD_VALUES[name])
    if name == "transition":
        table = value.coefficients
        batch = table.shape[1] + 1 if table.shape[1] > 1 else 97
        return draw.choice([table, None, "step", Transition(table[:, :1].expand(6, batch))])
    if name == "selection":
        index, weight = value.index.clone(), value.weight
        index[draw.randrange(len(index)), draw.randrange(index.shape[1])] = draw.choice([10_000, 2**31 - 1])
        other = TokenSelection(torch.cat([value.index] * 2), torch.cat([weight] * 2))
        return draw.choice([TokenSelection(index, weight), other, value.index, None, [[1]]])
    bad: list[Any] = [3.5, "tensor", [1.0], value.to("meta"), value.to(torch.complex64), value.int()]
    if name not in OPTIONAL and not (operation == "nft" and name == "old_model_output"):
        bad.append(None)
    if name in SETS_THE_SHAPE:
        bad += [value[..., :0], value[(None,) * 6], value.flatten()]
    elif name == "key":  # of any length
        bad += [value.unsqueeze(-1), value[None]]
    elif (name == "old_log_prob" and value.ndim == 1) or name in ("advantages", "weights"):
        # Another dimension may make them those of locations or of phrases.
        bad += [torch.cat([value] * 2)]
    else:
        bad += [value.unsqueeze(-1), value[None], torch.cat([value] * 2)]
    if name == "weights":
        broken = value.clone(memory_format=torch.contiguous_format)
        broken.view(-1)[draw.randrange(broken.numel())] = draw.choice([math.nan, math.inf, -1e-3])
        bad.append(broken)
    if name == "mask":
        bad.append(torch.zeros_like(value))
    return draw.choice(bad)


def bad_argument(draw: Draw, operation: str) -> None:
    function, arguments_of = CALLS[operation]
    arguments = arguments_of(draw)
    name = draw.choice(sorted({*arguments, *EVERY[operation]}))
    value = spoilt(draw, operation, name, arguments.get(name))
    if operation == "allocation" and name == "maps" and isinstance(value, Tensor) and value.is_meta:
        return  # served: shapes without values
    spoiled = {**arguments, name: value}
    if spoiled.get("rows", 0) is None:
        spoiled.pop("rows")
    if "backend" not in spoiled and operation not in ("allocation", "maps", "attention"):
        spoiled["backend"] = draw.choice(["native", "naive"])
    shown = f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
    problem = "was accepted"
    try:
        function(**spoiled)
    except (TypeError, ValueError) as error:
        if name in str(error):
            return
        problem = f"is not named by {type(error).__name__}: {error}"
    raise AssertionError(f"{name} = {shown:.200} {problem}")
