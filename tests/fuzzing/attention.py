"""Random calls of attention and of its maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuzzing.comparing import DTYPES, check, plain, wide
from fuzzing.memory import Draw
from torch import Tensor

from star_kernels import TokenSelection, attention, attention_maps


def some_selection(draw: Draw, batch: int, length: int) -> TokenSelection:
    slots, phrases = draw.choice([1, 2, 3, 8, 9, draw.randint(1, 40)]), draw.choice([1, 1, 2, 4])
    index = torch.randint(-1, length, (batch, slots), generator=draw.generator, dtype=torch.int32)
    if draw.chance(0.3):
        index[:, -1] = index[:, 0]  # a repeated token
    if draw.chance(0.2):
        index[draw.randrange(batch)] = -1  # an empty sequence
    if draw.chance(0.05):
        index[:] = -1
    weight = draw.uniform_tensor(batch, phrases, slots) * (draw.uniform_tensor(batch, phrases, slots) < 0.7)
    return TokenSelection(draw.place("selection.index", index), draw.place("selection.weight", weight))


def attention_arguments(draw: Draw, gathers_queries: bool) -> dict[str, Any]:
    batch, heads = draw.randint(1, 3), draw.randint(1, 4)
    queries, keys = draw.choice([1, draw.randint(1, 90)]), draw.choice([1, draw.randint(1, 90)])
    if draw.chance(0.03):
        batch, heads, queries, keys = 2, 4, 300, 310  # work for several threads
    width = draw.choice([1, 7, 8, 16, 32, 64, draw.randint(1, 80)])
    layout, dtype = draw.choice(["bhsd", "bshd"]), draw.choice(DTYPES)

    def heads_of(name: str, length: int) -> Tensor:
        shape = (batch, heads, length, width) if layout == "bhsd" else (batch, length, heads, width)
        return draw.place(name, draw.choice([1.0, 1.0, 3.0]) * draw.normal(*shape).to(dtype))

    query, key = heads_of("query", queries), heads_of("key", keys)
    if queries == keys and draw.chance(0.3):
        key = query
    gathered, dense = (queries, keys) if gathers_queries else (keys, queries)
    arguments: dict[str, Any] = {"query": query, "key": key, "layout": layout}
    arguments["selection"] = some_selection(draw, batch, gathered)
    start = draw.randrange(dense)
    length = draw.randint(1, dense - start)
    arguments["rows"] = draw.choice([None, (start, length), slice(start, start + length), slice(start - dense, None)])
    if draw.chance(0.4):
        mask = draw.uniform_tensor(batch, keys) < 0.6
        mask[:, draw.randrange(keys)] = True
        if draw.chance(0.3):
            mask[draw.randrange(batch)] = False
        arguments["key_mask"] = draw.place("key_mask", mask)
    arguments["scale"] = draw.choice([None, None, 0.3, -0.2, 1])
    arguments["reduce_heads"] = draw.chance(0.6)
    return arguments


def maps_arguments(draw: Draw) -> dict[str, Any]:
    direction = draw.choice(["image_to_text", "text_to_image"])
    arguments = attention_arguments(draw, direction == "text_to_image")
    query, key = (
        t.transpose(1, 2) if arguments["layout"] == "bshd" else t for t in map(arguments.get, ("query", "key"))
    )
    scale = query.shape[3] ** -0.5 if arguments["scale"] is None else arguments["scale"]
    scores = torch.matmul(query.double(), key.double().transpose(-1, -2)) * scale
    if "key_mask" in arguments:
        scores = scores.masked_fill(~arguments["key_mask"][:, None, None], -torch.inf)
    if draw.chance(0.3):
        size = [n if d == 3 or draw.chance(0.6) else 1 for d, n in enumerate(scores.shape)]
        arguments["attn_mask"] = draw.place("attn_mask", draw.uniform_tensor(*size) < 0.6)
        scores = scores.masked_fill(~arguments["attn_mask"], -torch.inf)
    lse = draw.place("lse", torch.logsumexp(scores, dim=-1).float(), expands=False)
    return {**arguments, "lse": lse, "direction": direction}


def compare_attention(
    draw: Draw,
    run: Callable[[Callable[[Any], Any], str], tuple[dict[str, Tensor], dict[str, Tensor]]],
    lse: Tensor | None = None,
) -> None:
    """Compares a call with the reference in the same dtype and in float64.

    ``run`` returns the results of the call and its differentiable inputs.
    """
    found = []
    upstream: dict[str, Tensor] = {}
    for convert, backend in ((lambda value: value, "auto"), (plain, "naive"), (wide, "naive")):
        results, leaves = run(convert, backend)
        for name, result in results.items():
            if name not in upstream:
                upstream[name] = draw.place(f"gradient of {name}", draw.normal(*result.shape))
        used = {n: r for n, r in results.items() if r.requires_grad}
        gradients = torch.autograd.grad(
            list(used.values()), list(leaves.values()), [upstream[n].to(r.dtype) for n, r in used.items()]
        )
        found.append({**results, **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}})
    got, eager, exact = found
    # The error of a probability is that of the log-sum-exp, which grows with its size; PyTorch's 16-bit attention
    # rounds it to less than float32, and computes its gradients from a rounded output.
    fused = lse is None
    lse = exact["lse"].detach() if lse is None else lse
    least = max(1.0, float(lse.masked_fill(lse.isinf(), 0.0).abs().max()))
    for name, result in got.items():
        check(name, result.detach(), eager[name].detach(), exact[name].detach(), least=least, slack=8 if fused else 1)


def maps(draw: Draw) -> None:
    arguments = maps_arguments(draw)

    def run(convert: Callable[[Any], Any], backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaves = {name: convert(arguments[name]).detach().requires_grad_() for name in ("query", "key", "lse")}
        others = {name: convert(value) for name, value in arguments.items() if name not in leaves}
        return {"maps": attention_maps(**leaves, **others, backend=backend)}, leaves

    compare_attention(draw, run, arguments["lse"])


def whole_arguments(draw: Draw) -> dict[str, Any]:
    arguments = attention_arguments(draw, False)
    value = draw.place("value", draw.normal(*arguments["key"].shape).to(arguments["key"].dtype))
    arguments["value"] = arguments["key"] if draw.chance(0.2) else value
    return arguments


def whole(draw: Draw) -> None:
    arguments = whole_arguments(draw)

    def run(convert: Callable[[Any], Any], backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaves = {name: convert(arguments[name]).detach().requires_grad_() for name in ("query", "key", "value")}
        others = {name: convert(value) for name, value in arguments.items() if name not in leaves}
        result = attention(**leaves, **others, backend=backend, return_lse=True)
        return {"out": result.out, "maps": result.maps, "lse": result.lse}, leaves

    compare_attention(draw, run)
