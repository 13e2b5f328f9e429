"""The run of everything that needs a GPU: what it makes of its steps, which needs none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.reporting import thresholds
from tools import gpu


def test_a_step_ends_as_its_command_does_and_leaves_a_log(tmp_path: Path) -> None:
    for status, outcome in ((0, "ok"), (3, "FAILED")):
        command = [sys.executable, "-c", f"print('first'); print('=== 5 passed ==='); raise SystemExit({status})"]
        result = gpu.run(gpu.Step("tests", command, 60.0, gpu.last_line), tmp_path, 60.0)
        assert (result.outcome, result.detail) == (outcome, "5 passed")
        assert "first" in (tmp_path / "tests.log").read_text()
        assert result.good == (status == 0)


def test_a_step_without_time_is_not_a_good_one(tmp_path: Path) -> None:
    result = gpu.run(gpu.Step("tuning", ["false"], 60.0, gpu.last_line), tmp_path, 0.0)
    assert result.outcome == "too slow"
    assert not result.good


def test_all_steps_together_stay_under_nine_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "sanitizer", lambda: "compute-sanitizer")
    found = gpu.steps(tmp_path)
    assert [step.name for step in found] == list(gpu.NAMES)
    assert gpu.TOTAL < 540
    for step in found:  # the files that they run are there
        assert [part for part in step.command if part.endswith(".py") and not (gpu.ROOT / part).exists()] == []


def test_what_a_sanitizer_found_is_told() -> None:
    log = "every kernel gave ...\n========= ERROR SUMMARY: 2 errors\n"
    assert gpu.findings(log) == "ERROR SUMMARY: 2 errors"
    assert gpu.findings("no kernels\n") == "no kernels"


def test_the_table_shows_every_target(tmp_path: Path) -> None:
    case = {
        "name": thresholds.LOSS,
        "dtype": "float32",
        "ratios": {
            "eager_over_ours": {"median": 12.0, "low": 11.0, "high": 13.0, "count": 9},
            "launches": {"median": 4},
        },
    }
    outcomes = thresholds.evaluate({"policy": [case]}, "cuda")
    (tmp_path / "overhead-x.json").write_text(json.dumps({"thresholds": [o.as_dict() for o in outcomes]}))
    lines = gpu.targets(tmp_path)
    told = {line.split()[4]: line.split()[0] for line in lines}
    assert told["eager_over_ours"] == "reached"
    assert told["launches"] == "MISSED"
    assert told["compiled_over_ours"] == "undecided"  # not measured is not reached
    text = gpu.table([gpu.Result("tests", "FAILED", 3.0, "1 failed")], lines, 3.0)
    assert "FAILED" in text
    assert all(line in text for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU that torch" in capsys.readouterr().err
