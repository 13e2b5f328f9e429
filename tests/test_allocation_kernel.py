"""The kernel of allocate: which calls it computes, its error, and caps on weights of any magnitude."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_kernels import allocate, allocation
from star_kernels.allocation import LAYOUTS

pytestmark = pytest.mark.native


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 1.25, 4.0])
def test_an_ordinary_call_is_one_kernel_with_at_most_twice_the_error_of_pytorch(
    cap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """In every layout, for contiguous maps and others; against float64."""
    sizes_of = {"b": 3, "s": 3, "g": 2, "p": 1001, "f": 2, "h": 17, "w": 19}
    for layout in LAYOUTS:
        maps = torch.rand([sizes_of[letter] for letter in layout]).to(dtype) ** 4
        shares = maps.float().flatten(len(layout.rstrip("pfhw"))).sum(dim=-1).sqrt()  # of steps
        maps[1] = 0 if "s" in layout else -1
        for placed in (maps, maps.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()):
            for over in ("step", "trajectory")[: 1 + ("s" in layout)]:
                signal = shares if over == "trajectory" and cap != 4 else None
                options: dict[str, Any] = {"strength": 0.75, "over": over, "cap": cap, "step_signal": signal}
                exact = allocate(placed.double(), layout=layout, **options)
                same = allocation.reference(placed, layout, **options)
                with monkeypatch.context() as patch:
                    patch.setattr(allocation, "reference", None)
                    found = allocate(placed, layout=layout, **options)
                assert found.shape == maps.shape
                assert found.dtype == torch.float32
                assert found.is_contiguous()
                assert not found.requires_grad
                allowed = 2 * float((same.double() - exact).abs().max())
                assert float((found.double() - exact).abs().max()) <= max(allowed, 1e-7)


def test_modes_and_transforms_see_tensor_operations() -> None:
    maps = torch.rand(2, 3, 40) ** 2
    expected = allocate(maps, layout="bsp", cap=1.5)
    compiled = torch.compile(lambda given: allocate(given, layout="bsp", cap=1.5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.vmap(lambda given: allocate(given, cap=1.5))(maps), expected, rtol=1e-5, atol=1e-6)
    negated = torch.complex(torch.zeros_like(maps), -maps).conj().imag  # a view with the negative bit
    torch.testing.assert_close(allocate(negated, layout="bsp", cap=1.5), expected, rtol=1e-5, atol=1e-6)
    assert allocate(maps.to("meta"), layout="bsp", cap=1.5).device.type == "meta"


@pytest.mark.parametrize("decay", [0.5, 0.97, 0.9999])
def test_a_cap_on_weights_of_any_decay_gives_a_mean_of_one(decay: float) -> None:
    """The excess of each weight at the cap raises others above it, which takes the kernel several passes."""
    maps = (decay ** torch.arange(20_000, dtype=torch.float64)).float()[None]
    for cap in (1.0001, 1.1, 10.0):
        weights = allocate(maps, cap=cap).double()
        assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
        assert float(weights.max()) <= cap * (1 + 1e-7)
        torch.testing.assert_close(weights, allocate(maps.double(), cap=cap), rtol=1e-6, atol=1e-7)
