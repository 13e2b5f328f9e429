"""tools.fused_loss without a GPU: its losses, its comparison and its command."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.variants.policy import make_inputs
from tools import fused_loss


@pytest.mark.native
@pytest.mark.parametrize("name", fused_loss.LOSSES)
def test_every_loss_has_a_gradient(name: str) -> None:
    x = make_inputs((2, 4, 8, 8), torch.float32, torch.device("cpu"))
    found = fused_loss.results_of(fused_loss.LOSSES[name], x)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert bool(found["gradient"].any())
    assert fused_loss.difference(found, found) == 0.0


def test_a_nan_is_a_difference() -> None:
    found = {"loss": torch.tensor(torch.nan), "gradient": torch.ones(3)}
    assert fused_loss.difference(found, {"loss": torch.tensor(1.0), "gradient": torch.ones(3)}) == torch.inf


def test_the_shape_of_the_launch_holds_in_its_context_only() -> None:
    with fused_loss.launched("8x512"):
        assert os.environ["STAR_KERNELS_FUSED"] == "8x512"
    assert "STAR_KERNELS_FUSED" not in os.environ


def test_the_gradient_ends_at_the_boundary() -> None:
    leaf = torch.ones(3, requires_grad=True)
    inner = fused_loss.Boundary.apply(leaf)
    for _ in range(2):
        inner.backward(torch.ones(3))
    assert leaf.grad is None


def test_the_command_requires_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as status:
        fused_loss.main([])
    assert status.value.code == 2
    assert "no GPU" in capsys.readouterr().err
