"""benchmarks/overhead.py: intervals, budgets, limits, progress, summary and interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead
from benchmarks.parts import host
from benchmarks.reporting import plot, summary, thresholds
from benchmarks.timing import harness, progress
from benchmarks.timing.clocks import CpuClock, Sample

RESULTS = sorted((Path(overhead.__file__).parent / "results").glob("overhead-*.json"))


class SteadyClock:
    """A clock by which every call takes one second."""

    name = "steady"

    def time(self, runs: Any) -> list[Sample]:
        return [Sample(1.0) for _ in runs]


def variants() -> list[harness.Variant]:
    return [harness.Variant(name, name, lambda: None) for name in ("a", "b")]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8, 9, 30, 101, 1500])
def test_the_interval_contains_the_median_with_a_probability_of_95_percent(count: int) -> None:
    rank = harness.interval_rank(count)
    missed = [
        2 * sum(math.comb(count, k) for k in range(r + 1)) / 2**count
        for r in ((-1, 0, 1) if rank is None else (rank, rank + 1))
    ]
    if rank is None:
        assert count < 6
        assert missed[1] > 0.05
    else:
        assert missed[0] <= 0.05 < missed[1]  # no narrower interval does
        figure = harness.summarise(list(range(count)))
        assert (figure.low, figure.high) == (rank, count - 1 - rank)


def test_fewer_than_six_rounds_have_no_interval() -> None:
    assert "low" not in harness.summarise([1.0, 2.0, 3.0]).as_dict()


def test_a_comparison_ends_when_its_budget_is_spent() -> None:
    late = harness.Budget(100, until=time.perf_counter() - 1)
    assert harness.interleave(variants(), SteadyClock(), late, "late").figure("a").count == 2
    assert harness.interleave(variants(), SteadyClock(), harness.Budget(7), "by rounds").figure("a").count == 7


def test_until_is_divided_among_cases_and_seconds_apply_to_each() -> None:
    now = time.perf_counter()
    assert harness.Budget(9, seconds=8.0, until=now + 60).for_next(3).until == pytest.approx(now + 20, abs=1)
    assert harness.Budget(9, seconds=8.0, until=now + 60).for_next(3).seconds == 8.0
    assert harness.Budget(9, seconds=8.0).for_next(3).until == math.inf
    assert harness.Budget(9, seconds=8.0).share(0.25).seconds == 2.0


def test_a_plan_has_the_number_of_the_part_and_the_time_left() -> None:
    plan = progress.Plan({"attention": 60.0, "policy": 120.0})
    assert (plan.place, plan.left) == ("", 180.0)
    plan.begin("policy")
    assert plan.place == "[2/2]"
    assert plan.left == pytest.approx(120, abs=1)
    plan.began -= 500  # later than planned
    assert plan.left == 0
    assert [progress.duration(s) for s in (4, 44, 70, 200, math.inf)] == [
        "about 10 s", "about 40 s", "about 1 min", "about 3 min", ""
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        ({"median": 1.01, "low": 1.0, "high": 1.02, "count": 9}, thresholds.HELD),
        ({"median": 1.01, "low": 1.0, "high": 1.04, "count": 9}, thresholds.UNDECIDED),
        ({"median": 1.05, "low": 1.02, "high": 1.06, "count": 9}, thresholds.UNDECIDED),
        ({"median": 1.05, "low": 1.04, "high": 1.06, "count": 9}, thresholds.FAILED),
        ({"median": 1.5, "count": 3}, thresholds.UNDECIDED),  # no interval
        ({"median": 1.0}, thresholds.HELD),  # counted, not timed
        ({"median": 1.5}, thresholds.FAILED),
        ({}, thresholds.UNDECIDED),  # not measured
    ],
)
def test_a_limit_fails_only_if_the_whole_interval_lies_beyond_it(figure: dict[str, Any], verdict: str) -> None:
    case = {"name": thresholds.STEP, "dtype": "float32", "ratios": {"star_over_plain": figure}}
    (outcome,) = thresholds.evaluate({"end-to-end": [case]}, "cpu")
    assert outcome.verdict == verdict
    assert outcome.passed == (verdict == thresholds.HELD)


def test_the_limits_of_cpus_hold_on_a_cpu_with_amx() -> None:
    ratios = {"overhead": {"median": 1.017}, "materialised_over_ours": {"median": 2.7}}
    case = {"name": thresholds.ATTENTION, "dtype": "bfloat16", "ratios": ratios}
    assert [o.verdict for o in thresholds.evaluate({"attention": [case]}, "cpu")] == [thresholds.HELD] * 2


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_summary_fits_on_a_screen(path: Path) -> None:
    found = json.loads(path.read_text())
    text = summary.text(found)
    lines = text.splitlines()
    assert len(lines) <= 23  # the names of the written files take one more
    assert max(map(len, lines)) <= 100
    assert "[" not in text
    assert "BUSY" in text


def test_the_summary_of_an_idle_machine_says_so() -> None:
    found = json.loads(RESULTS[0].read_text())
    for cases in found["parts"].values():
        for case in cases:
            case["disturbed_calls"] = 0.01
            for figure in case["ratios"].values():
                figure |= {"calm": True, "count": 9}
    text = summary.text(found)
    assert "The machine was idle: other programs used the processor in 1% of the calls." in text
    assert "*" not in text
    assert "+0.6 %   +0.4 to +1.1 %" in text
    assert "none" not in text


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces measurements by committed results and plots by a file. Parts in the returned list are interrupted."""
    committed = json.loads(next(path for path in RESULTS if "amd" in path.name).read_text())["parts"]
    interrupted: list[str] = []

    def measure(part: str, *_: Any) -> Iterator[dict[str, Any]]:
        if part in interrupted:
            raise KeyboardInterrupt
        yield from committed[part]

    monkeypatch.setattr(overhead, "measure", measure)
    monkeypatch.setattr(overhead, "ON_CPU", ("attention", "policy", "end-to-end"))
    monkeypatch.setattr(plot, "draw", lambda path, result: [path] if path.write_text("a plot") else [])
    return interrupted


def run(out: Path, *arguments: str) -> int:
    return overhead.main(["--device", "cpu", "--out", str(out), *arguments])


def test_results_come_part_by_part_and_the_summary_last(
    stubs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    order = ("3 parts, about 2 min", "ATTENTION", "POLICY", "END-TO-END", "COST OF MAPS", "wrote")
    places = [printed.index(text) for text in order]
    assert places == sorted(places)
    assert len(printed[printed.index("COST OF MAPS") :].splitlines()) <= 24
    assert "FAILED" not in printed
    assert "undecided" not in printed
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())
    assert found["complete"]
    assert list(found["parts"]) == ["attention", "policy", "end-to-end"]
    assert {row["verdict"] for row in found["thresholds"]} == {thresholds.HELD, thresholds.UNDECIDED}
    assert written.with_suffix(".png").exists()


def test_an_interrupted_run_writes_its_complete_parts(
    stubs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.append("end-to-end")
    assert run(tmp_path) == 130
    printed = capsys.readouterr()
    assert "interrupted in part 'end-to-end'" in printed.err
    assert "COST OF MAPS" in printed.out
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())
    assert not found["complete"]
    assert list(found["parts"]) == ["attention", "policy"]


def test_an_interruption_before_any_part_writes_nothing(
    stubs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.append("attention")
    assert run(tmp_path / "out") == 130
    assert "no part was measured" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_only_check_compares_with_the_limits(
    stubs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "--check") == 0
    assert "LIMITS: 17 held, 0 FAILED, 1 undecided" in capsys.readouterr().out
    beyond = thresholds.Threshold("policy", "eager_over_ours", ">=", 50.0)
    monkeypatch.setattr(thresholds, "THRESHOLDS", (*thresholds.THRESHOLDS, beyond))
    assert run(tmp_path) == 0
    assert run(tmp_path, "--check") == 1


def test_host_time_is_that_of_one_call_and_has_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert run(tmp_path, "--quick", "--only", "host") == 0
    assert torch.get_num_threads() == threads
    assert "Host time of a call on tiny tensors, in brackets the same in PyTorch: attention" in capsys.readouterr().out
    (written,) = tmp_path.glob("*.json")
    (case,) = json.loads(written.read_text())["parts"]["host"]
    functions = ("policy_loss", "policy_loss_autograd", "sample_transition", "flow_sde", "allocate")
    names = ("attention", "attention_gradients", "attention_differentiable", *functions)
    assert list(case["times"]) == [f"{side}_{name}" for name in names for side in ("other", "ours")]
    for name in names:
        in_microseconds = case["ratios"][f"{name}_us"]["median"]
        of_ours = 1e6 * case["times"][f"ours_{name}"]["median"]
        assert 0 < of_ours < 1e5
        assert in_microseconds == pytest.approx(of_ours) or name.startswith("attention")
    limits = [t for t in thresholds.THRESHOLDS if t.part == "host"]
    assert {t.ratio for t in limits} < set(case["ratios"])
    outcomes = thresholds.evaluate({"host": [case | {"name": thresholds.HOST}]}, "cpu")
    assert {o.verdict for o in outcomes} == {thresholds.UNDECIDED}  # three rounds have no interval


def test_a_clock_of_several_calls_gives_the_time_of_one() -> None:
    calls: list[float] = []
    sample, *others = CpuClock(torch.device("cpu"), calls=5).time([lambda: calls.append(time.sleep(0.01) or 0.0)])
    assert (len(calls), others) == (5, [])
    assert 0.01 <= sample.seconds < 0.05


def test_a_pair_that_differs_is_an_error() -> None:
    found = torch.ones(3)
    host._check_close("allocate", (found,), (found,))
    with pytest.raises(RuntimeError, match="allocate and the same computation in PyTorch differ by more than"):
        host._check_close("allocate", found, found + 1e-2)


def test_invalid_options_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--quick", "--thorough"], "--quick and --thorough are mutually exclusive"),):
        with pytest.raises(SystemExit):
            overhead.parse(["--device", "cpu", *arguments])
        assert message in capsys.readouterr().err


def test_a_run_does_not_write_over_the_committed_results() -> None:
    assert overhead.parse([]).out == Path(overhead.__file__).resolve().parents[1] / "runs" / "overhead"


def test_several_parts_may_be_chosen() -> None:
    assert overhead.parse(["--only", "policy", "host", "--only", "epoch"]).only == ["policy", "host", "epoch"]


def test_a_part_measures_and_reports_its_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--quick", "--only", "attention") == 0
    printed = capsys.readouterr()
    assert "[1/1] attention · smoke test · float32 ... about 10 s left" in printed.err
    assert "smoke test, 2 of 24 heads, float32" in printed.out
    (image,) = tmp_path.glob("*.png")
    assert image.stat().st_size > 10_000
