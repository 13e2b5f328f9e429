"""``torch.ops.star_kernels`` and the compiled library with arguments that the functions of star_kernels never pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_inputs import SELECTION, TRANSITION, inputs, numbers
from torch import Tensor
from torch.autograd import forward_ad

from star_kernels import native


# Arguments of the operators themselves, in order.
def operator_arguments(name: str) -> dict[str, Any]:
    t = inputs()
    chosen = {"index": SELECTION.index, "weight": SELECTION.weight, "key_mask": None}
    rows = {"start": 1, "n_rows": 3, "scale": 0.3, "reduce_heads": True}
    coefficients = {"coefficients": TRANSITION.coefficients}
    latent = {n: t[n] for n in ("model_output", "sample", "prev_sample")}
    options = {"weights": t["weights"], "mask": t["mask"], "step_weights": t["step_weights"]}
    flags = {"weighted_kl": False, "unreduced": False}
    qkv = {n: t[n] for n in ("query", "key", "value")}
    saved = {"out": t["query"], "lse": t["lse"]}
    policy = {
        **latent, "old_log_prob": t["old_log_prob"], "advantages": t["advantages"], **coefficients, **options,
        "old_model_output": t["old_model_output"], "ref_model_output": None, "channel_dim": 1, "per_location": True,
        **flags, "clip_low": 0.5, "clip_high": 1.5, "advantage_clip": 5.0, "kl_coef": 0.0, "kl_mask_threshold": 0.0,
        "backend": "native",
    }  # fmt: skip
    nft = {
        "model_output": t["model_output"], "old_model_output": t["old_model_output"], "target": t["sample"],
        "advantages": t["advantages"], "sigma": t["sigma"], **options, "ref_model_output": None, "channel_dim": 1,
        "adaptive": True, **flags, "beta": 1.0, "advantage_clip": 5.0, "kl_coef": 0.0, "backend": "native",
    }  # fmt: skip
    attn_mask = torch.ones(2, 1, *(t[n].shape[2] for n in ("query", "key")), dtype=torch.bool)
    maps = {"query": t["query"], "key": t["key"], "lse": t["lse"], "attn_mask": attn_mask, **chosen, **rows}
    pairs = {"attn_mask": attn_mask, "scale": 0.3}
    qk = {n: t[n] for n in ("query", "key")}
    grad_maps = {"grad_maps": numbers(2, 2, 3)}
    return {
        "attention": {**qkv, **chosen, **rows, "backend": "vendor"},
        "attention_backward": {
            "grad_out": t["value"], **grad_maps, "grad_lse": None, **qkv, **saved, **chosen, **rows, "backend": "vendor"
        },
        "attention_maps": {**maps, "text_to_image": False},
        "attention_maps_backward": {
            **grad_maps, **maps, "text_to_image": False
        },
        "attention_rows": {**qk, **pairs},
        "attention_rows_backward": {
            "grad_lse": t["lse"], "grad_entropy": None, **qk, "lse": t["lse"], "entropy": t["lse"], **pairs
        },
        "attention_columns": {**qk, "lse": t["lse"], **pairs},
        "attention_columns_backward": {"grad_sums": numbers(2, 2, 5), **qk, "lse": t["lse"], **pairs},
        "weighted_policy_loss": policy,
        "weighted_policy_loss_backward": {"grad_loss": torch.ones(()), "saved": torch.ones(2, 2), **policy},
        "weighted_nft_loss": nft,
        "weighted_nft_loss_backward": {"grad_loss": torch.ones(()), "saved": torch.ones(3, 2), **nft},
        "sample_transition": {
            "model_output": t["model_output"], "sample": t["sample"], "noise": t["noise"], **coefficients,
            "channel_dim": 1, "backend": "native",
        },
    }[name]  # fmt: skip


OPERATORS = [
    *("attention", "attention_backward", "attention_maps", "attention_maps_backward", "sample_transition"),
    *(f"attention_{kind}{end}" for kind in ("rows", "columns") for end in ("", "_backward")),
    *(f"weighted_{kind}_loss{end}" for kind in ("policy", "nft") for end in ("", "_backward")),
]


def spoilt(value: Any) -> list[Any]:
    """Values that would crash a kernel."""
    if isinstance(value, Tensor):
        shapes = [value[None]]
        if value.ndim:
            shapes += [value[:0], value[..., :0], torch.cat([value] * 2), torch.cat([value] * 2, dim=-1)]
        if value.ndim > 1:
            shapes += [value.flatten(), value[:, :0], value.transpose(0, -1)]
        return [*shapes, value.double() if value.is_floating_point() else value.float()]
    if isinstance(value, int) and not isinstance(value, bool):
        return [-1, 2**63 - 1, -(2**63), 2**62]
    return []


@pytest.mark.native
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_rejects_arguments_that_would_crash_it(name: str) -> None:
    operator, arguments = getattr(torch.ops.star_kernels, name), operator_arguments(name)
    operator(*arguments.values())
    for argument, value in arguments.items():
        for bad in spoilt(value):
            given = {**arguments, argument: bad}
            with pytest.raises((TypeError, ValueError), match=r"must |coefficients"):
                operator(*given.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_rejects_tensors_of_several_devices(name: str) -> None:
    """Also on the meta device, which computes no values: the result would be uninitialised memory."""
    operator, arguments = getattr(torch.ops.star_kernels, name), operator_arguments(name)
    given = [argument for argument, value in arguments.items() if isinstance(value, Tensor)]
    for argument in given[1:]:
        with pytest.raises(ValueError, match=rf"^{argument} must be on the device of {given[0]}, cpu, got meta"):
            operator(*{**arguments, argument: arguments[argument].to("meta")}.values())


@pytest.mark.native
@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_rejects_tensors_without_elements(name: str, dimension: int) -> None:
    """All tensors of the latent's or the query's shape at once, so that they agree with one another."""
    arguments = operator_arguments(name)
    first = next(value for value in arguments.values() if isinstance(value, Tensor) and value.ndim == 4)
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and value.shape == first.shape:
            arguments[argument] = value.narrow(dimension, 0, 0)
    with pytest.raises((TypeError, ValueError), match=r"none of them 0"):
        getattr(torch.ops.star_kernels, name)(*arguments.values())


@pytest.mark.parametrize(("name", "wrt"), [("attention", "query"), ("weighted_policy_loss", "model_output")])
def test_torch_ops_under_torch_func_is_an_error_that_names_an_alternative(name: str, wrt: str) -> None:
    arguments = operator_arguments(name)

    def function(x: Tensor) -> Tensor:
        return getattr(torch.ops.star_kernels, name)(*{**arguments, wrt: x}.values())[0]

    x = arguments[wrt]
    with pytest.raises(NotImplementedError, match=f"{name} does not support differentiation by torch.func: call"):
        torch.func.grad(lambda x: function(x).sum())(x)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert forward_ad.unpack_dual(function(dual.detach())).tangent is None
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            function(dual)


@pytest.mark.native
@pytest.mark.parametrize("threads", [0, -1, -(2**40), 2**40])
def test_the_library_rejects_an_invalid_number_of_threads(threads: int) -> None:
    library, t = native.cpu(), inputs()
    out, log_prob, maps = torch.empty(2, 4, 3, 4), torch.empty(2, 3, 4), torch.empty(2, 2, 5)
    latents, chosen = (t["model_output"], t["sample"], t["noise"]), (SELECTION.index, SELECTION.weight, None)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        library.sample_transition(*latents, TRANSITION.coefficients, 1, threads, out, log_prob)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        library.attention_maps(t["query"], t["key"], t["lse"], *chosen, 0, 1.0, False, True, threads, maps)


@pytest.mark.native
@pytest.mark.parametrize("start", [-1, 5, 2**63 - 1, 2**63 - 5])
def test_the_library_rejects_rows_past_the_sequence(start: int) -> None:
    t, maps = inputs(), torch.empty(2, 2, 5)
    chosen = (SELECTION.index, SELECTION.weight, None)
    with pytest.raises(ValueError, match="rows must lie within the sequence"):
        native.cpu().attention_maps(t["query"], t["key"], t["lse"], *chosen, start, 1.0, False, True, 1, maps)


@pytest.mark.native
@pytest.mark.parametrize("dimension", [1, 3], ids=["heads", "head dimension"])
def test_the_library_rejects_tensors_without_elements_or_memory(dimension: int) -> None:
    library, t = native.cpu(), inputs()
    chosen = (SELECTION.index, SELECTION.weight, None)
    empty = [t[name].narrow(dimension, 0, 0) for name in ("query", "key")]
    lse = t["lse"] if dimension == 3 else t["lse"][:, :0]
    with pytest.raises(ValueError, match="query must have shape"):
        library.attention_maps(*empty, lse, *chosen, 0, 1.0, False, True, 1, torch.empty(2, 2, 5))
    for bad, message in (
        (t["sample"][:, :0], "have elements"),
        (torch._efficientzerotensor((2, 4, 3, 4)), "have memory"),
    ):
        with pytest.raises(ValueError, match=f"model_output must {message}"):
            library.sample_transition(
                bad, bad, bad, TRANSITION.coefficients, 1, 1, torch.empty_like(bad), torch.empty(2, 3, 4)
            )
