"""Weights have mean one for any map, and a degenerate map does not affect other samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_kernels import allocate, allocation, total_variation
from star_kernels.allocation import LAYOUTS as LAYOUTS_OF_ALLOCATE

MANY = settings(max_examples=80, deadline=None)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
)


@pytest.fixture(autouse=True, scope="module", params=[pytest.param("native", marks=pytest.mark.native), "reference"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(allocation, "_library", lambda *tensors: None)
        yield


LAYOUTS = {2: "bp", 3: "bsp", 4: "bsgp"}


def weigh(maps: torch.Tensor, **options: Any) -> torch.Tensor:
    return allocate(maps, layout=LAYOUTS[maps.ndim], **options)


def sizes(maps: torch.Tensor, over: str) -> tuple[int, ...]:
    return (-2, -1) if over == "trajectory" else (-1,)


@st.composite
def problems(draw: Any) -> tuple[torch.Tensor, float, str, float | None]:
    shape = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    maps = torch.rand(shape, generator=generator)
    maps = maps ** draw(st.sampled_from([0.5, 1, 4, 30]))
    if draw(st.booleans()):
        maps = maps * (torch.rand(shape, generator=generator) < 0.3)  # zeros, sometimes a whole sample
    maps = maps * 10.0 ** draw(st.sampled_from([-30, -8, 0, 8, 30]))
    over = draw(st.sampled_from(["step", "trajectory"])) if len(shape) == 3 else "step"
    cap = draw(st.one_of(st.none(), st.sampled_from([1.01, 1.5, 2.0, 3.0]), st.floats(1.01, 20)))
    return maps, draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])), over, cap


@MANY
@given(problems())
def test_weights_are_non_negative_with_mean_one(problem: tuple) -> None:
    maps, strength, over, cap = problem
    weights = weigh(maps, strength=strength, over=over, cap=cap)
    assert weights.shape == maps.shape
    assert weights.dtype == torch.float32
    assert bool((weights >= 0).all())
    mean = weights.double().mean(dim=sizes(maps, over))
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-5)
    if cap is not None:
        assert float(weights.max()) <= cap * (1 + 1e-6)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("over", ["step", "trajectory"])
def test_each_phrase_has_its_own_weights(over: str, cap: float | None) -> None:
    maps = torch.rand(2, 3, 4, 25) ** 4
    maps[0, :, 1] = 0
    maps[1, 0, 2, 7] = torch.nan
    found = weigh(maps, over=over, cap=cap, strength=0.75)
    assert found.shape == maps.shape
    for phrase in range(4):
        alone = weigh(maps[:, :, phrase], over=over, cap=cap, strength=0.75)
        torch.testing.assert_close(found[:, :, phrase], alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0, :, 1], torch.ones(3, 25))


@MANY
@given(problems())
def test_weights_have_the_order_of_the_map(problem: tuple) -> None:
    maps, strength, over, cap = problem
    weights = weigh(maps, strength=strength, over=over, cap=cap)
    order = maps.flatten(-len(sizes(maps, over))).argsort(dim=-1)
    ordered = weights.flatten(-len(sizes(maps, over))).gather(-1, order)
    assert bool((ordered.diff(dim=-1) >= -1e-5 * ordered[..., 1:].abs() - 1e-6).all())


@MANY
@given(problems(), st.sampled_from([2.0**-20, 2.0**-3, 8.0, 2.0**10]))
def test_scale_of_the_map_does_not_matter(problem: tuple, factor: float) -> None:
    maps, strength, over, cap = problem
    maps = maps.clamp(max=1e30) * (maps > 1e-20)  # so that a power of two is exact
    expected = weigh(maps, strength=strength, over=over, cap=cap)
    assert torch.equal(weigh(maps * factor, strength=strength, over=over, cap=cap), expected)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_maps_give_proportional_weights(scale: float) -> None:
    maps = torch.tensor([[1.0, 2.0, 3.0, 6.0] * 8]) / 6 * scale
    expected = torch.tensor([[1 / 3, 2 / 3, 1.0, 2.0] * 8])
    # Subnormal numbers have few digits.
    torch.testing.assert_close(weigh(maps), expected, rtol=0.2 if scale < 1e-40 else 1e-5, atol=0)


@pytest.mark.parametrize("over", ["step", "trajectory"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_strength_zero_gives_exactly_ones(over: str, cap: float | None) -> None:
    maps = torch.rand(3, 4, 77) * 1e3
    assert torch.equal(weigh(maps, strength=0, over=over, cap=cap), torch.ones_like(maps))


@pytest.mark.parametrize("over", ["step", "trajectory"])
@pytest.mark.parametrize("value", [1e-30, 0.1, 1 / 3, 7.0, 1e30])
def test_a_flat_map_gives_ones(over: str, value: float) -> None:
    weights = weigh(torch.full((2, 3, 1357), value), over=over)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_formula(strength: float) -> None:
    maps = torch.rand(3, 4, 50, dtype=torch.float64)
    for over, dims in (("step", (2,)), ("trajectory", (1, 2))):
        expected = (1 - strength) + strength * maps / maps.mean(dim=dims, keepdim=True)
        torch.testing.assert_close(weigh(maps, strength=strength, over=over), expected)


def test_the_share_of_a_step_is_its_mass_over_the_trajectory_and_one_over_the_step() -> None:
    maps = torch.rand(2, 3, 40) * torch.tensor([1.0, 2.0, 5.0])[:, None]
    mass = maps.double().mean(dim=2)
    by_trajectory = weigh(maps, over="trajectory").double().mean(dim=2)
    torch.testing.assert_close(by_trajectory, mass / mass.mean(dim=1, keepdim=True), rtol=1e-5, atol=0)
    by_step = weigh(maps, over="step").double().mean(dim=2)
    torch.testing.assert_close(by_step, torch.ones_like(by_step), rtol=1e-5, atol=0)


def test_steps_are_allocated_independently_like_samples() -> None:
    maps = torch.rand(2, 3, 40)
    assert torch.equal(weigh(maps).flatten(0, 1), weigh(maps.flatten(0, 1)))


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -torch.inf, -1e-3], ids=str)
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_degenerate_map_gives_ones_and_does_not_affect_other_samples(
    bad: float, everywhere: bool, cap: float | None
) -> None:
    maps = torch.rand(3, 50)
    clean = weigh(maps, cap=cap)
    maps[1, slice(None) if everywhere or bad == 0 else 7] = bad
    weights = weigh(maps, cap=cap)
    assert torch.equal(weights[1], torch.ones(50))
    assert torch.equal(weights[[0, 2]], clean[[0, 2]])


def test_a_degenerate_step_gives_ones_to_its_whole_trajectory_or_only_to_itself() -> None:
    maps = torch.rand(2, 3, 20)
    maps[0, 1, 4] = torch.nan
    assert torch.equal(weigh(maps, over="trajectory")[0], torch.ones(3, 20))
    assert torch.equal(weigh(maps)[0, 1], torch.ones(20))
    assert torch.equal(weigh(maps)[0, 0], weigh(maps[:, :1])[0, 0])


@pytest.mark.parametrize("cap", [1.001, 1.5, 2.0, 7.9, 8.0, 9.0, 1e6])
@pytest.mark.parametrize("positive", ["one", "two", "few", "all"])
def test_capped_weights_have_mean_one(positive: str, cap: float) -> None:
    maps = torch.zeros(1, 8)
    count = {"one": 1, "two": 2, "few": 5, "all": 8}[positive]
    maps[0, :count] = torch.tensor([64.0, 16, 4, 2, 1, 1, 1, 1])[:count]
    weights = weigh(maps, cap=cap)
    assert float(weights.max()) <= cap * (1 + 1e-6)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0), rtol=1e-6, atol=0)
    below = weights[(weights < cap * (1 - 1e-6)) & (maps > 0)]
    share = below / maps[(weights < cap * (1 - 1e-6)) & (maps > 0)]
    if len(share):  # the excess is redistributed in proportion
        torch.testing.assert_close(share, share[:1].expand_as(share), rtol=1e-5, atol=0)


def test_the_excess_is_spread_evenly_over_zeros() -> None:
    maps = torch.zeros(1, 5)
    maps[0, 3] = 0.2
    torch.testing.assert_close(weigh(maps, cap=3.0), torch.tensor([[0.5, 0.5, 0.5, 3.0, 0.5]]))


@pytest.mark.parametrize("cap", [1.01, 2.0])
def test_a_cap_is_respected_by_weights_of_every_magnitude(cap: float) -> None:
    maps = torch.logspace(0, -44, 24)[None]
    weights = weigh(maps, cap=cap)
    assert float(weights.min()) >= 0
    assert float(weights.max()) <= cap
    assert float(weights.mean()) == pytest.approx(1, rel=1e-6)
    below = (weights < cap * (1 - 1e-6)) & (maps > 1e-37)  # smaller values have few digits
    ratio = weights[below] / maps[below]
    if len(ratio):
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
    torch.testing.assert_close(weigh(torch.tensor([[0.2, 0.0]]), cap=1.5), torch.tensor([[1.5, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cap_that_the_dtype_rounds_is_respected_if_all_mass_is_at_it(dtype: torch.dtype) -> None:
    maps = torch.zeros(1, 15, dtype=dtype)
    maps[0, 0] = 1.0
    weights = weigh(maps, cap=1.01)
    torch.testing.assert_close(weights[0, 0], torch.tensor(1.01, dtype=dtype))
    torch.testing.assert_close(weights[0, 1:], torch.full((14,), 13.99 / 14, dtype=dtype))


def test_a_cap_that_nothing_reaches_changes_nothing() -> None:
    maps = torch.rand(2, 60) + 0.5
    torch.testing.assert_close(weigh(maps, cap=10.0), weigh(maps), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_precision_maps_give_float32_weights(dtype: torch.dtype) -> None:
    maps = torch.rand(2, 4096).to(dtype)
    weights = weigh(maps)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), weigh(maps.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("phrases", [(), (4,)], ids=str)
def test_a_signal_determines_the_share_of_steps_and_maps_that_of_positions(
    phrases: tuple[int, ...], cap: float | None
) -> None:
    maps, signal = torch.rand(2, 3, *phrases, 25) ** 2, torch.rand(2, 3, *phrases) + 0.5
    found = weigh(maps, over="trajectory", step_signal=signal, cap=cap, strength=0.5)
    assert found.shape == maps.shape
    torch.testing.assert_close(found.mean(dim=(1, -1)), torch.ones(2, *phrases))
    expected = maps / maps.mean(dim=-1, keepdim=True) * (signal / signal.mean(dim=1, keepdim=True))[..., None]
    if cap is None:
        torch.testing.assert_close(found, 0.5 + 0.5 * expected)
    else:
        assert float(found.max()) <= cap * (1 + 1e-6)
    if phrases:
        shared = weigh(maps, over="trajectory", step_signal=signal[:, :, 0], cap=cap)
        alone = [weigh(maps[:, :, g], over="trajectory", step_signal=signal[:, :, 0], cap=cap) for g in range(*phrases)]
        torch.testing.assert_close(shared, torch.stack(alone, dim=2))


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_a_degenerate_signal_gives_equal_shares_and_does_not_affect_other_samples(bad: float) -> None:
    maps, signal = torch.rand(3, 4, 20), torch.rand(3, 4)
    expected = weigh(maps, over="trajectory", step_signal=signal)
    signal[1] = torch.tensor([bad, 0, 0, 0])
    found = weigh(maps, over="trajectory", step_signal=signal)
    torch.testing.assert_close(found[1], weigh(maps)[1])
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    maps[0, 2] = 0  # a step with a degenerate map has uniform weights equal to its share
    torch.testing.assert_close(
        weigh(maps, over="trajectory", step_signal=signal)[0, 2], (signal[0, 2] / signal[0].mean()).expand(20)
    )


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_tiny_and_huge_signals_give_proportional_shares(scale: float) -> None:
    found = weigh(torch.ones(1, 2, 5), over="trajectory", step_signal=torch.tensor([[1.0, 3.0]]) * scale)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.5, 1.5]))


def test_total_variation_is_the_share_of_a_map_that_moves() -> None:
    maps = torch.tensor([[[4.0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 2, 0], [0, 0, 0, 0]]])
    following = torch.tensor([[[0.0, 0, 1, 0], [3, 3, 3, 3], [0, 0, 8, 8], [1, 0, 0, 0]]])
    torch.testing.assert_close(total_variation(maps, following, layout="bsp"), torch.tensor([[1.0, 0.0, 0.5, 0.0]]))
    of_phrases = total_variation(*(m.unsqueeze(2).expand(1, 4, 3, 4) for m in (maps, following)), layout="bsgp")
    torch.testing.assert_close(of_phrases, torch.tensor([1.0, 0.0, 0.5, 0.0])[None, :, None].expand(1, 4, 3))
    assert total_variation(maps.half(), following.double(), layout="bsp").dtype == torch.float64
    following[0, 2, 3] = torch.nan
    assert total_variation(maps, following, layout="bsp")[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not total_variation(maps.requires_grad_(), following, layout="bsp").requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"over": "step"},
            ValueError,
            "step_signal must be None unless over='trajectory', got a signal with over='step'",
        ),
        ({"step_signal": torch.ones(2, 4)}, ValueError, r"step_signal must have shape \[2, 3\] for .* got \[2, 4\]"),
        ({"step_signal": [1.0]}, TypeError, "step_signal must be a floating-point tensor, got list"),
        (
            {"step_signal": torch.ones(2, 3, device="meta")},
            ValueError,
            "step_signal must be on the device of maps, cpu, got meta",
        ),
    ],
)
def test_a_bad_signal_is_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        weigh(torch.ones(2, 3, 5), **{"over": "trajectory", "step_signal": torch.ones(2, 3), **options})


def test_bad_maps_for_total_variation_are_named() -> None:
    with pytest.raises(ValueError, match=r"following must have the shape of maps, \[2, 3, 5\], got \[2, 4, 5\]"):
        total_variation(torch.ones(2, 3, 5), torch.ones(2, 4, 5), layout="bsp")
    with pytest.raises(ValueError, match=r"layout must be given for maps of shape \[2, 3, 5\]: one of 'bsp'$"):
        total_variation(torch.ones(2, 3, 5), torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match="layout must be given for maps of shape"):
        total_variation(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"layout must be one of 'bsp', 'bsgp', .* got 'bhw'"):
        total_variation(torch.ones(2, 3, 5), torch.ones(2, 3, 5), layout="bhw")
    with pytest.raises(TypeError, match=r"following must be a floating-point tensor, got torch\.int64"):
        total_variation(torch.ones(2, 3, 5), torch.ones(2, 3, 5, dtype=torch.int64), layout="bsp")
    with pytest.raises(ValueError, match="following must be on the device of maps, cpu, got meta"):
        total_variation(torch.ones(2, 3, 5), torch.ones(2, 3, 5, device="meta"), layout="bsp")


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("layout", [known for known in LAYOUTS_OF_ALLOCATE if known != "bp"])
def test_a_grid_gives_the_weights_of_its_flattened_positions(layout: str, cap: float | None) -> None:
    lengths = {"b": 2, "s": 3, "g": 2, "p": 20, "f": 2, "h": 4, "w": 5}
    maps = torch.rand([lengths[letter] for letter in layout]) ** 3
    rows = maps.view(-1, maps[(0,) * len(layout.rstrip("pfhw"))].numel())  # every map by itself
    found = allocate(maps, layout=layout, cap=cap)
    assert found.shape == maps.shape
    assert torch.equal(found.reshape(rows.shape), allocate(rows, cap=cap))
    if "s" in layout:
        flat = maps.flatten(len(layout.rstrip("pfhw")))
        change = total_variation(maps, maps.flip(1), layout=layout)
        assert torch.equal(change, total_variation(flat, flat.flip(1), layout=LAYOUTS[flat.ndim]))
        for signal in (None, change):
            options: dict[str, Any] = {"over": "trajectory", "cap": cap, "step_signal": signal}
            assert torch.equal(allocate(maps, layout=layout, **options), weigh(flat, **options).view_as(maps))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 8), r"for maps of shape \[2, 8, 8\]: one of 'bgp', 'bsp', 'bhw'"),
        ((2, 3, 8, 8), r"for maps of shape \[2, 3, 8, 8\]: one of 'bsgp', 'bghw', 'bshw', 'bfhw'"),
    ],
)
def test_maps_of_more_than_two_dimensions_need_a_layout(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"layout must be given {message}"):
        allocate(torch.ones(shape))


def test_weights_are_detached() -> None:
    assert not weigh(torch.rand(2, 5, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("maps", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "maps must be a floating-point tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int64), {}, TypeError, "maps must be a floating-point tensor, got torch.int64"),
        (torch.ones(3), {}, ValueError, r"layout must be given for maps of shape \[3\]"),
        (torch.ones(2, 0), {}, ValueError, r"maps must have shape \[B, P\] .*none of them 0, got \[2, 0\]"),
        (torch.ones(2, 3), {"layout": "bhw"}, ValueError, r"maps must have shape \[B, h, w\] .*got \[2, 3\]"),
        (torch.ones(2, 1, 4, 4), {"layout": "bhw"}, ValueError, r"got \[2, 1, 4, 4\]; maps\[:, 0\] are the maps of"),
        (torch.ones(2, 3), {"layout": "hw"}, ValueError, "layout must be one of 'bp', .* got 'hw'"),
        (torch.ones(2, 3), {"layout": 3}, ValueError, "layout must be one of 'bp', .* got 3"),
        (torch.ones(2, 3).to_sparse(), {}, TypeError, r"maps must be a dense tensor .* got torch\.sparse_coo"),
        (torch.ones(2, 3), {"over": "trajectory"}, ValueError, "layout must include steps, .* got 'bp'"),
        (torch.ones(2, 3, 4), {"over": "trajectory", "layout": "bgp"}, ValueError, "must include steps, .* got 'bgp'"),
        (torch.ones(2, 3), {"over": "space"}, ValueError, "over must be 'step' or 'trajectory', got 'space'"),
        (torch.ones(2, 3), {"strength": -0.1}, ValueError, "strength must be between 0 and 1, got -0.1"),
        (torch.ones(2, 3), {"strength": 1.1}, ValueError, "strength must be between 0 and 1, got 1.1"),
        (torch.ones(2, 3), {"strength": torch.nan}, ValueError, "strength must be between 0 and 1, got nan"),
        (torch.ones(2, 3), {"strength": "all"}, TypeError, "strength must be a number, got 'all'"),
        (torch.ones(2, 3), {"cap": "none"}, TypeError, "cap must be a number, got 'none'"),
        (torch.ones(2, 3), {"cap": 1.0}, ValueError, "cap must be finite and above 1, got 1.0"),
        (torch.ones(2, 3), {"cap": torch.inf}, ValueError, "cap must be finite and above 1, got inf"),
        (torch.ones(2, 3), {"cap": torch.nan}, ValueError, "cap must be finite and above 1, got nan"),
    ],
)
def test_bad_input_is_named(maps: Any, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        allocate(maps, **options)
