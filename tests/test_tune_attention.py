"""The tuner's choices, which need no GPU: stand-ins are timed by a clock that knows how long they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tune_attention
from attention_variants import Shape, make_inputs
from clocks import Sample
from tune_attention import Candidate

from star_kernels.attention import naive, triton_config, tuning
from star_kernels.attention.triton_config import Tile

SHAPE = Shape("tiny", 1, 2, 32, 40, 8)
DTYPE = torch.float32


class KnownTimes:
    """A clock that runs everything and gives each call the seconds that its name is known to take."""

    name = "known"

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        for run in runs:
            run()
        return [Sample(self.seconds[id(run)]) for run in runs]


def candidates(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> KnownTimes:
    """Lets the tuner find candidates that compute the definition, and a clock by which they take these times."""
    seconds: dict[int, float] = {}
    tile = triton_config.forward_config("sm_90", 32, DTYPE)
    tiles = triton_config.backward_config("sm_90", 32, DTYPE)

    def make(part: str, with_tile: Any) -> Callable[[Any], list[Candidate]]:
        def found(x: Any) -> list[Candidate]:
            arguments = (x.selection.index, x.selection.weight, None, x.shape.rows, x.scale, True)
            made = []
            for kernel in ("triton", "flash", "cudnn"):
                run = partial(naive.attention, x.query, x.key, x.value, *arguments)
                seconds[id(run)] = times[f"{part} {kernel}"]
                made.append(Candidate(kernel, run, with_tile if kernel == "triton" else None))
            return made

        return found

    monkeypatch.setattr(tune_attention, "forward_candidates", make("forward", tile))
    monkeypatch.setattr(tune_attention, "backward_candidates", make("backward", tiles))
    return KnownTimes(seconds)


TIMES = {
    "forward triton": 3e-3, "forward flash": 2e-3, "forward cudnn": 1e-3,
    "backward triton": 1e-3, "backward flash": 2e-3, "backward cudnn": 3e-3,
}  # fmt: skip


def test_the_fastest_kernel_of_each_pass_goes_into_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = candidates(TIMES, monkeypatch)
    (row,) = tune_attention.tune([(SHAPE, DTYPE)], torch.device("cpu"), clock, 2.0)
    assert (row["forward"], row["backward"]) == ("cudnn", "triton")
    assert row["milliseconds"]["forward"]["flash"] == [2.0, 2.0, 2.0]
    # A call with a mask or a gradient of the maps takes Triton's kernels all the same: their tiles are there.
    assert row["tiles"]["forward"] == list(triton_config.forward_config("sm_90", 32, DTYPE).__dict__.values())
    assert row["size_class"] == tuning.size_class(48, 48)
    path = tuning.write_table(tmp_path, "A GPU", {}, [row])
    assert tuning.read_plan(tuning._read(path)[0]).forward == "cudnn"


def test_shapes_without_time_are_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = candidates(TIMES, monkeypatch)
    assert tune_attention.tune([(SHAPE, DTYPE)], torch.device("cpu"), clock, 0.0) == []
    assert "no time was left for tiny" in capsys.readouterr().err


def test_candidates_that_fail_or_disagree_are_refused_with_the_reason() -> None:
    good = torch.ones(4)

    def broken() -> Any:
        raise RuntimeError("out of resource: shared memory\nmore")

    made = [
        Candidate("too_large", broken),
        Candidate("first", lambda: (good,)),
        Candidate("wrong", lambda: (1.1 * good,)),
        Candidate("spoilt", lambda: (good * torch.nan,)),
        Candidate("same", lambda: (good,)),
    ]
    kept, refused = tune_attention.runnable(made, torch.bfloat16)
    assert [candidate.name for candidate in kept] == ["first", "same"]
    assert refused["too_large"] == "RuntimeError: out of resource: shared memory"
    assert set(refused) == {"too_large", "wrong", "spoilt"}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_shipped_tiles_are_among_the_candidates(architecture: str, head_dim: int) -> None:
    forward = triton_config.forward_config(architecture, head_dim, torch.bfloat16)
    backward = triton_config.backward_config(architecture, head_dim, torch.bfloat16)
    assert tune_attention.forward_tiles(forward)[0] == forward
    assert tune_attention.backward_tiles(backward)[0] == backward
    for tiles in (tune_attention.forward_tiles(forward), tune_attention.backward_tiles(backward)):
        assert len(set(tiles)) == len(tiles) >= 3
        names = {Candidate("triton", lambda: None, tile).name for tile in tiles}
        assert len(names) == len(tiles)
    assert all(tile.block_n >= 16 and tile.num_stages >= 1 for tile in tune_attention.forward_tiles(Tile(64, 16, 4, 1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_attention.main([])
    assert "no GPU that torch" in capsys.readouterr().err


def test_inputs_are_those_of_the_benchmark() -> None:
    assert make_inputs(SHAPE, DTYPE, torch.device("cpu")).query.shape == (1, 2, 48, 32)
