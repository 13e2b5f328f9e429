"""The public functions with every kind of derivative, transform, view and layout of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_inputs import SELECTION, TRANSITION, inputs
from torch import Tensor, nn
from torch.autograd import forward_ad

from star_kernels import (
    TokenSelection,
    allocate,
    attention,
    attention_maps,
    flow_sde,
    operators,
    sample_transition,
    torch_internals,
    total_variation,
    weighted_nft_loss,
    weighted_policy_loss,
)

BACKENDS = ["auto", "naive"]


def attend(t: dict[str, Tensor], backend: str) -> Tensor:
    return attention(t["query"], t["key"], t["value"], SELECTION, backend=backend).out


def attend_for_maps(t: dict[str, Tensor], backend: str) -> Tensor:
    return attention(t["query"], t["key"], t["value"], SELECTION, backend=backend).maps


def maps_of_lse(t: dict[str, Tensor], backend: str) -> Tensor:
    return attention_maps(t["query"], t["key"], t["lse"], SELECTION, backend=backend)


def policy(t: dict[str, Tensor], backend: str) -> Tensor:
    positional = (t[name] for name in ("model_output", "sample", "prev_sample", "old_log_prob", "advantages"))
    options: dict[str, Any] = {name: t[name] for name in ("weights", "mask", "step_weights", "old_model_output")}
    return weighted_policy_loss(*positional, TRANSITION, clip_range=(0.9, 9.0), backend=backend, **options).loss


def nft(t: dict[str, Tensor], backend: str) -> Tensor:
    positional = (t[name] for name in ("model_output", "old_model_output", "sample", "advantages", "sigma"))
    options: dict[str, Any] = {name: t[name] for name in ("weights", "mask", "step_weights")}
    return weighted_nft_loss(*positional, adaptive=False, backend=backend, **options).loss


def drawn(t: dict[str, Tensor], backend: str) -> Tensor:
    return torch.cat(
        [
            r.flatten()
            for r in sample_transition(*(t[n] for n in ("model_output", "sample")), TRANSITION, noise=t["noise"])
        ]
    )


Function = Callable[[dict[str, Tensor], str], Tensor]
# function, differentiable inputs, constant ones
FUNCTIONS: dict[str, tuple[Function, list[str], list[str]]] = {
    "attention": (attend, ["query", "key", "value"], []),
    "attention for maps": (attend_for_maps, ["query", "key"], []),
    "attention_maps": (maps_of_lse, ["query", "key", "lse"], []),
    "weighted_policy_loss": (
        policy,
        ["model_output"],
        ["sample", "prev_sample", "old_log_prob", "advantages", "weights", "step_weights", "old_model_output"],
    ),
    "weighted_nft_loss": (
        nft,
        ["model_output"],
        ["old_model_output", "sample", "advantages", "weights", "step_weights"],
    ),
    "sample_transition": (drawn, [], ["model_output", "sample", "noise"]),
}
DIFFERENTIABLE = [(name, wrt) for name, (_, differentiable, _) in FUNCTIONS.items() for wrt in differentiable]
CONSTANT = [(name, wrt) for name, (_, _, constant) in FUNCTIONS.items() for wrt in constant]
EVERY = DIFFERENTIABLE + CONSTANT


def of_one(name: str, wrt: str, backend: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A function of one of its inputs, and that input."""
    given = inputs()
    return (lambda x: FUNCTIONS[name][0]({**given, wrt: x}, backend)), given[wrt]


def tangent(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


@pytest.mark.parametrize(("name", "wrt"), DIFFERENTIABLE)
def test_forward_mode_is_an_error_of_the_kernels_and_right_in_the_reference(name: str, wrt: str) -> None:
    function, x = of_one(name, wrt, "naive")
    direction = torch.full_like(x, 0.5)
    expected = torch.func.jvp(function, (x,), (direction,))[1]
    epsilon = 1e-2
    differences = (function(x + epsilon * direction) - function(x - epsilon * direction)) / (2 * epsilon)
    torch.testing.assert_close(expected, differences, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(tangent(function, x, direction), expected)
    torch.func.jacfwd(function)(x)

    function, x = of_one(name, wrt, "auto")
    for attempt in (
        lambda: torch.func.jvp(function, (x,), (direction,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: tangent(function, x, direction),
        lambda: tangent(function, x.clone().requires_grad_(), direction),
        lambda: torch.func.grad(lambda x: torch.func.jvp(function, (x,), (direction,))[1].sum())(x),
        lambda: torch.func.jvp(torch.func.grad(lambda x: function(x).sum()), (x,), (direction,)),
    ):
        with pytest.raises(NotImplementedError, match=r"star_kernels::\w+ has no forward-mode derivative .*naive"):
            attempt()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "wrt"), CONSTANT)
def test_constant_inputs_have_no_derivative_in_any_mode(name: str, wrt: str, backend: str) -> None:
    function, x = of_one(name, wrt, backend)
    assert not function(x.clone().requires_grad_()).requires_grad
    assert tangent(function, x, torch.ones_like(x)) is None
    assert not torch.func.jvp(function, (x,), (torch.ones_like(x),))[1].any()
    assert not torch.func.grad(lambda x: function(x).sum())(x).any()


def test_the_coefficients_of_a_step_and_the_weights_of_a_selection_are_constants_too() -> None:
    t = inputs()
    sigma = torch.tensor([0.9, 0.8], requires_grad=True)
    for backend in BACKENDS:
        results = sample_transition(t["sample"], t["sample"], flow_sde(sigma, 0.5, sigma_max=0.95), backend=backend)
        assert not any(result.requires_grad for result in results)
        selection = TokenSelection(SELECTION.index, SELECTION.weight.clone().requires_grad_())
        found = attention(t["query"], t["key"], t["value"], selection, return_lse=True, backend=backend)
        maps = attention_maps(t["query"], t["key"], t["lse"], selection, backend=backend)
        assert not any(result.requires_grad for result in (*found, maps))


def test_allocations_are_detached_in_every_mode() -> None:
    maps = torch.rand(2, 3, 5)
    for function in (
        lambda m: allocate(m, layout="bsp", cap=1.5),
        lambda m: allocate(maps, layout="bsp", over="trajectory", step_signal=m.sum(dim=2)),
        lambda m: total_variation(m, m.flip(1), layout="bsp"),
    ):
        assert not function(maps.clone().requires_grad_()).requires_grad
        assert tangent(function, maps, maps) is None
        assert not torch.func.jvp(function, (maps,), (maps,))[1].any()
        torch.testing.assert_close(torch.func.vmap(function)(torch.stack([maps, maps]))[1], function(maps))


def test_a_transition_is_differentiated_in_every_mode() -> None:
    def mean(sigma: Tensor) -> Tensor:
        return flow_sde(sigma, 0.5, sigma_max=0.95).mean_output.double()

    sigma = torch.tensor([0.9, 0.8], dtype=torch.float64)
    expected = torch.func.jacrev(mean)(sigma)
    torch.testing.assert_close(torch.func.jacfwd(mean)(sigma), expected)
    torch.testing.assert_close(tangent(mean, sigma, torch.ones_like(sigma)), expected.sum(dim=1))
    torch.testing.assert_close(torch.func.vmap(mean)(sigma[:, None])[:, 0], mean(sigma))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "wrt"), DIFFERENTIABLE)
def test_the_transforms_of_torch_func_agree_with_autograd(name: str, wrt: str) -> None:
    function, x = of_one(name, wrt, "auto")
    leaf = x.clone().requires_grad_()
    upstream = torch.linspace(-1, 1, function(x).numel()).view_as(function(x))
    (expected,) = torch.autograd.grad(function(leaf), leaf, upstream)

    def scalar(x: Tensor) -> Tensor:
        return (function(x) * upstream).sum()

    both = torch.stack([x, 0.9 * x])
    other = function(0.9 * x)
    torch.testing.assert_close(torch.func.grad(scalar)(x), expected)
    torch.testing.assert_close(torch.func.vjp(function, x)[1](upstream)[0], expected)
    torch.testing.assert_close(torch.func.jacrev(scalar)(x), expected)
    torch.testing.assert_close(torch.func.vmap(function)(both)[1], other)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(scalar))(both)[0], expected)
    torch.testing.assert_close(torch.func.grad(lambda b: torch.func.vmap(scalar)(b).sum())(both)[0], expected)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(scalar)(x).sum())(x)


@pytest.mark.parametrize(("name", "wrt"), EVERY)
def test_an_input_changed_in_place_before_the_backward_pass_is_an_error(name: str, wrt: str) -> None:
    if name == "sample_transition":
        wrt = "query"  # nothing is saved: any of the others will do
        name = "attention"
    given = inputs()
    leaf = FUNCTIONS[name][1][0]
    given[leaf] = given[leaf].clone().requires_grad_() * 1
    result = FUNCTIONS[name][0](given, "auto")
    with torch.no_grad():
        given[wrt].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x) if x.is_floating_point() else x


def imaginary(x: Tensor) -> Tensor:
    return torch.complex(x, -x).conj().imag if x.dtype == torch.float32 else x


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": negated,
    "imaginary part of a conjugate": imaginary,
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "functional": torch._to_functional_tensor,
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "strided": lambda x: torch.stack([x, x * 0 - 9], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_depend_on_values_and_not_on_memory(kind: str, backend: str) -> None:
    for name, wrt in EVERY:
        function, x = of_one(name, wrt, backend)
        unusual = KINDS[kind](x)
        plain = torch.zeros_like(x) if kind == "zero" else x[:1].expand_as(x).clone() if kind == "expanded" else x
        got = function(unusual)
        got = torch._from_functional_tensor(got) if torch._is_functional_tensor(got) else got
        torch.testing.assert_close(got, function(plain), msg=lambda m, w=wrt, n=name: f"{n}, {w}: {m}")


@pytest.mark.parametrize("kind", ["negated", "zero"])
def test_gradients_depend_on_upstream_values_and_not_on_memory(kind: str) -> None:
    for name, wrt in DIFFERENTIABLE:
        function, x = of_one(name, wrt, "auto")
        leaf = x.clone().requires_grad_()
        result = function(leaf)
        upstream = torch.full_like(result, 0.0 if kind == "zero" else 0.7)
        (expected,) = torch.autograd.grad(result, leaf, upstream, retain_graph=True)
        (got,) = torch.autograd.grad(result, leaf, KINDS[kind](upstream))
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "nested", "jagged"])
def test_a_tensor_without_strides_is_an_error_that_names_it(kind: str, backend: str) -> None:
    make: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse": Tensor.to_sparse,
        "mkldnn": Tensor.to_mkldnn,
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
        "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    }
    for name, wrt in EVERY:
        function, x = of_one(name, wrt, backend)
        if kind == "jagged" and x.ndim == 1:
            continue
        argument = "target" if (name, wrt) == ("weighted_nft_loss", "sample") else wrt
        with pytest.raises(TypeError, match=f"{argument} must be a dense tensor"):
            function(make[kind](x))


def test_without_private_names_of_pytorch_calls_go_through_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = {name: function(inputs(), "auto") for name, (function, *_) in FUNCTIONS.items()}
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    monkeypatch.setattr(operators, "WATCH", torch_internals.watch())
    assert operators.WATCH.observed()
    for name, (function, *_) in FUNCTIONS.items():
        torch.testing.assert_close(function(inputs(), "auto"), expected[name])
    function, x = of_one("attention", "query", "auto")
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(function, (x,), (x,))
