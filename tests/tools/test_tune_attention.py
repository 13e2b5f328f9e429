"""tools.tune_attention without a GPU: the choice among candidates, the times and the time limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.timing.clocks import Sample
from benchmarks.variants.attention import Inputs, Shape, make_inputs
from star_kernels.attention import naive, triton_config, tuning
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.triton_config import BackwardConfig, Tile
from tools import tune_attention as tune

SHAPE = Shape("tiny", 2, 3, 16, 20, 7)
TILES = [Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)]
CPU = torch.device("cpu")


class Clock:
    """A clock that does not run the calls; the time of a call is its attribute ``seconds``, or a millisecond."""

    name = "none"

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        return [Sample(self.seconds(run)) for run in runs]

    @staticmethod
    def seconds(run: Any) -> float:
        return float(getattr(run, "seconds", 1e-3))


class Run:
    """The reference implementation of attention with a relative error in its results, and the time of a call."""

    def __init__(self, function: Callable[[], Sequence[Tensor]], seconds: float, error: float = 0.0) -> None:
        self.function, self.seconds, self.error = function, seconds, error

    def __call__(self) -> list[Tensor]:
        return [t * (1 + self.error) for t in self.function()]


def inputs() -> Inputs:
    return make_inputs(SHAPE, torch.float32, CPU)


def whole_forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    arguments = MapArguments(x.selection.index, x.selection.weight, None, *x.shape.rows, x.scale, reduce_heads=True)
    return naive.attention(x.query, x.key, x.value, arguments)


def whole_backward(x: Inputs) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (x.query, x.key, x.value)]
    with torch.enable_grad():
        out = torch.softmax(leaves[0] @ leaves[1].transpose(-1, -2) * x.scale, dim=-1) @ leaves[2]
        return torch.autograd.grad(out, leaves, tune.upstream_of(x))


def test_the_reference_results_are_those_of_the_whole_inputs() -> None:
    x = tune.as_models_lay_out(inputs())
    assert x.query.transpose(1, 2).is_contiguous()
    for run, reference in ((whole_forward, tune.reference_forward), (whole_backward, tune.reference_backward)):
        kept, refused = tune.runnable([tune.Candidate("good", lambda run=run: run(x))], reference(x), 1e-5, lambda: 1.0)
        assert (len(kept), refused) == (1, {})


def test_candidates_that_are_wrong_or_do_not_run_are_refused_with_the_reason() -> None:
    x = inputs()

    def broken() -> Sequence[Tensor]:
        raise RuntimeError("out of resource: shared memory\nand more")

    candidates = [
        tune.Candidate("wrong", Run(lambda: whole_forward(x), 1e-3, error=0.01)),
        tune.Candidate("broken", broken),
        tune.Candidate("nan", Run(lambda: whole_forward(x), 1e-3, error=float("nan"))),
        tune.Candidate("good", Run(lambda: whole_forward(x), 1e-3)),
    ]
    kept, refused = tune.runnable(candidates, tune.reference_forward(x), 1e-4, lambda: 1.0)
    assert [c.name for c in kept] == ["good"]
    assert refused["wrong"].startswith("differs from the reference by 1.0e-02")
    assert refused["broken"] == "RuntimeError: out of resource: shared memory"
    assert "nan" in refused


def test_no_further_tile_is_tried_when_the_time_is_used_up() -> None:
    x = inputs()
    run = Run(lambda: whole_forward(x), 1e-3)
    plan = [("triton", TILES[0]), ("cudnn", None), ("triton", TILES[1])]
    candidates = [tune.Candidate(kernel, run, tile) for kernel, tile in plan]
    kept, refused = tune.runnable(candidates, tune.reference_forward(x), 1e-4, lambda: 0.0)
    assert [(c.kernel, c.tile) for c in kept] == plan[:2]
    assert list(refused.values()) == ["not tried: the time is used up"]


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates of which the fastest are cuDNN forward, and Triton with other tiles than the default backward."""

    def forward(x: Inputs) -> list[tune.Candidate]:
        run = lambda: whole_forward(x)  # noqa: E731
        slow, fast = (tune.Candidate("triton", Run(run, s), t) for s, t in zip((4e-3, 3e-3), TILES, strict=True))
        return [slow, tune.Candidate("cudnn", Run(run, 2e-3)), fast]

    def backward(x: Inputs) -> list[tune.Candidate]:
        run = lambda: whole_backward(x)  # noqa: E731
        pairs = [BackwardConfig(tile, tile) for tile in TILES]
        slow, fast = (tune.Candidate("triton", Run(run, s), t) for s, t in zip((5e-3, 1e-3), pairs, strict=True))
        return [slow, tune.Candidate("flash", Run(run, 6e-3)), fast]

    monkeypatch.setattr(tune, "forward_candidates", forward)
    monkeypatch.setattr(tune, "backward_candidates", backward)


@pytest.mark.usefixtures("candidates")
def test_the_fastest_kernels_become_an_entry_that_the_package_reads(tmp_path: Path) -> None:
    (row,) = tune.tune([(SHAPE, torch.float32)], CPU, Clock(), 0.5, now=lambda: 0.0)
    assert (row["forward"], row["backward"]) == ("cudnn", "triton")
    assert row["milliseconds"]["forward"]["cudnn"] == [2.0, 2.0, 2.0]
    path = tuning.write_table(tmp_path, "NVIDIA Some GPU", {}, [row])
    assert path.name == "nvidia-some-gpu.json"
    plan = tuning.read_plan(tuning._read(path)[0])
    assert plan == tuning.Plan("cudnn", "triton", TILES[1], BackwardConfig(TILES[1], TILES[1]), measured=True)
    assert "cudnn" in tune.text([row]).splitlines()[1]


@pytest.mark.usefixtures("candidates")
def test_the_time_limit_ends_the_tuning_and_keeps_the_measured_rows(capsys: pytest.CaptureFixture[str]) -> None:
    ticks = iter(range(10**6))
    rows = list(tune.tune([(SHAPE, torch.float32)] * 50, CPU, Clock(), 1.0, now=lambda: next(ticks) / 50))
    assert 0 < len(rows) < 50
    assert "the time is used up" in capsys.readouterr().err


@pytest.mark.usefixtures("candidates")
def test_all_candidates_are_compiled_until_the_time_is_used_up() -> None:
    assert tune.compile_candidates(SHAPE, torch.float32, CPU, 1.0, now=lambda: 0.0) == 6
    ticks = iter(range(10**6))
    assert tune.compile_candidates(SHAPE, torch.float32, CPU, 0.0, now=lambda: next(ticks)) == 4  # no further tiles


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_default_tiles_are_the_first_candidates(architecture: str, head_dim: int) -> None:
    forward = triton_config.forward_config(architecture, head_dim, torch.bfloat16)
    backward = triton_config.backward_config(architecture, head_dim, torch.bfloat16)
    assert tune.forward_tiles(forward)[0] == forward
    assert tune.backward_tiles(backward)[0] == backward
    for tiles in (tune.forward_tiles(forward), tune.backward_tiles(backward)):
        assert len(set(tiles)) == len(tiles) >= 3
        names = {tune.Candidate("triton", lambda: None, tile).name for tile in tiles}
        assert len(names) == len(tiles)
    assert all(tile.block_n >= 16 and tile.num_stages >= 1 for tile in tune.forward_tiles(Tile(64, 16, 4, 1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_tuning_without_a_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no GPU that torch" in capsys.readouterr().err
