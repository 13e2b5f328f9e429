"""tools.map_variants without a GPU: the check against the reference, the ratios and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks.timing.clocks import Sample
from benchmarks.timing.harness import Budget
from benchmarks.variants.attention import Shape, make_inputs
from star_kernels.attention import naive
from tools import map_variants as variants
from tools.map_variants import Candidate
from tools.tune_attention import map_arguments

SHAPE = Shape("tiny", 2, 3, 16, 20, 7)


class Clock:
    """A clock that does not run the calls, which have their time as an attribute."""

    name = "none"

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        return [Sample(run.seconds) for run in runs]  # type: ignore[attr-defined]


class Run:
    def __init__(self, function: Callable[[], Any], seconds: float) -> None:
        self.function, self.seconds = function, seconds

    def __call__(self) -> Any:
        return self.function()


def broken() -> Any:
    raise RuntimeError("no kernel\nfor this device")


def test_variants_are_checked_then_timed_and_their_ratios_are_printed() -> None:
    x = make_inputs(SHAPE, torch.float32, torch.device("cpu"))

    def results(per_head: bool, factor: float = 1.0) -> Any:
        arguments = map_arguments(x)._replace(reduce_heads=not per_head)
        out, maps, _ = naive.attention(x.query, x.key, x.value, arguments)
        return out, factor * maps

    candidates = [
        Candidate("copy", Run(broken, 4e-6)),
        Candidate("per head", Run(lambda: results(True), 2.5e-6)),
        Candidate("mean", Run(lambda: results(False), 5e-6)),
        Candidate("wrong maps", Run(lambda: results(True, 1.1), 1e-6)),
        Candidate("no kernel", Run(broken, 1e-6)),
    ]
    found = variants.compare(SHAPE, candidates, x, Clock(), Budget(8))
    assert list(found["variants"]) == ["copy", "per head", "mean"]
    assert found["refused"] == {
        "wrong maps": "maps: relative RMS error 1.0e-01, allowed 3e-02",
        "no kernel": "RuntimeError: no kernel",
    }
    assert found["variants"]["mean"]["ratio"]["median"] == pytest.approx(1.25)
    shown = variants.text(found)
    assert "2.50 us  0.6250 [0.6250, 0.6250] of 'copy', 80% of the speed of a copy" in shown
    assert "REFUSED: RuntimeError: no kernel" in shown


def test_nothing_is_timed_if_the_first_variant_is_refused() -> None:
    x = make_inputs(SHAPE, torch.float32, torch.device("cpu"))
    found = variants.compare(SHAPE, [Candidate("without", broken)], x, Clock(), Budget(2))
    assert not found["variants"]
    assert "REFUSED" in variants.text(found)


def test_the_shapes_are_those_of_the_targets() -> None:
    shapes = [(shape.name, shape.batch) for shape, _ in variants.cases()]
    assert shapes[:3] == [("SD3.5-M 512²", 2), ("SD3.5-M 512²", 16), ("SD3.5-M 1024²", 2)]
    assert set(shapes[3:]) == {("FLUX 1024²", 2)}


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        variants.main([])
    assert "no GPU" in capsys.readouterr().err
