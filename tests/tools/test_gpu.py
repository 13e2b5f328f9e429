"""tools.gpu without a GPU: the queue of real commands, their results and the table."""

from __future__ import annotations

import importlib
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead
from benchmarks.reporting import thresholds
from tools import gpu, tune_attention
from tools.device_queue import ROOT, Entry, Machine, Queue, Records, Result, entry_digest, kernels_digest, warm_ups

MACHINE = Machine("NVIDIA H200", {"torch": "2", "triton": "3"}, "abc")
ENTRIES = {entry.name: entry for entry in gpu.entries()}
COMMANDS = {e.name: e.command for entry in ENTRIES.values() for e in (entry, *warm_ups(entry))}


def test_the_order_is_that_of_value() -> None:
    assert list(ENTRIES) == [
        *("smoke", "hopper-right", "hopper-speed", "fused", "backends", "host", "policy", "capture", "step"),
        *("map-variants", "compiled", "attention", "gluon", "tuning"),
        *("tests", "memcheck", "racecheck", "initcheck", "synccheck", "suite"),
    ]
    assert ENTRIES["smoke"].seconds <= 60
    untimed = {name for name, entry in ENTRIES.items() if not entry.timed}
    assert untimed == {"smoke", "hopper-right", "backends", "tests", "memcheck", "racecheck", "initcheck", "synccheck"}
    for entry in ENTRIES.values():
        assert entry.seconds <= 8 * 60 / 2
        assert entry.decides.endswith(".")
        assert entry.decides.count(".") <= 2  # one sentence, and perhaps SD3.5


@pytest.mark.parametrize("name", COMMANDS)
def test_the_files_and_options_of_a_command_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = list(COMMANDS[name])
    scripts = [argument for argument in command if argument.endswith(".py") or argument == "tests"]
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    modules = [b for a, b in pairwise(command) if a == "-m" and b != "gpu"]
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    if "pytest" in modules or "{compute-sanitizer}" in command:
        assert scripts
        return
    assert len(scripts) + len(modules) == 1
    main: Any = overhead.main if scripts else importlib.import_module(modules[0]).main
    if name == "gluon":
        assert command == ["{python}", "-m", "tools.gluon_forward"]
        return
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    shown = capsys.readouterr().out.replace(",", " ").split()
    assert [a for a in command if a.startswith("--") and a not in shown and f"[{a}" not in shown] == []


def test_the_parts_of_the_benchmark_exist_and_none_is_missing() -> None:
    parts = [b for c in COMMANDS.values() for a, b in pairwise(c) if a == "--only"]
    assert set(parts) <= set(overhead.PARTS)
    assert set(overhead.PARTS) - set(parts) == {"epoch"}  # mostly of the CPU


def test_the_step_and_the_capture_have_at_least_15_rounds() -> None:
    for name in ("capture", "step", "compiled"):
        command = ENTRIES[name].command
        assert int(command[command.index("--repetitions") + 1]) >= 15


def test_every_shape_of_the_tuning_is_compiled_by_a_process() -> None:
    assert len(ENTRIES["tuning"].warm_up) == len(tune_attention.SHAPES)


def test_the_summary_of_a_sanitizer_is_found_in_its_output() -> None:
    log = "all kernels agree with ...\n========= ERROR SUMMARY: 2 errors\n"
    assert gpu.findings(log) == "ERROR SUMMARY: 2 errors"
    assert gpu.findings("no kernels\n") == "no kernels"


def test_the_summary_of_the_fused_loss_has_what_is_wrong_or_the_times() -> None:
    times = "8x16x64x64 float32: copy 3.1 | 16x256 6.4 us; fastest PolicyLoss 16x256: 0.48 of the copy's bandwidth\n"
    assert gpu.fused_times(times) == "PolicyLoss 16x256: 0.48 of the copy's bandwidth"
    assert gpu.fused_times(f"FAILED: 8x256 differs\n{times}") == "8x256 differs"
    assert gpu.fused_times("no GPU\n") == "no GPU"


def test_the_summary_of_the_hopper_kernel_has_what_is_wrong_or_its_ratios() -> None:
    log = (
        "head dim 64, (2, 176, 2, 1): right\nhead dim 128, (2, 128, 2, 1): FAILED\nok      0.1 s  one tile\n"
        "FAILED 9.5 s  3 tiles\n  waits: key full 0\nFAILED: head dim 128\n"
    )
    assert gpu.hopper_verdict(log) == "head dim 128, (2, 128, 2, 1): FAILED 9.5 s  3 tiles"
    assert gpu.hopper_verdict("all 10 shapes are right\n") == "all 10 shapes are right"
    times = "FLUX\n  cudnn   800.0 us  1.0000 of 'cudnn'\n  hopper   790.0 us  0.9875 [0.98, 0.99] of 'cudnn'\n"
    times += "  hopper, maps   792.0 us  0.9900 of 'cudnn'\n"
    assert gpu.hopper_times(times) == "0.9875 0.9900"
    assert gpu.hopper_times("no GPU\n") == "no GPU"


def test_the_summary_of_the_gluon_kernel_has_the_times_of_all_variants() -> None:
    log = (
        "128x128 stages 2\n  output agrees with PyTorch; 0.9 ms, PyTorch 0.8 ms\n64x3\n  output agrees with PyTorch; 1"
    )
    assert gpu.gluon_times(log) == "0.9 ms, PyTorch 0.8 ms | 1"
    assert gpu.gluon_times("no GPU\n") == "no GPU"


def test_the_summary_of_the_map_variants_has_the_fastest_of_each_comparison() -> None:
    log = (
        "SD3.5-M 512\n  without   65.1 us  1.0000 of 'without'\n  keys, output last   67.0 us  1.0290 [1.02, 1.03] of "
        "'without'\n  scores   66.0 us  1.0140 of 'without'\nFLUX\n  copy   20.0 us  1.0000 of 'copy'\n"
        "  map kernel, 3 stages   11.0 us  0.5500 of 'copy', 91% of the speed of a copy\nall variants agree\n"
    )
    assert gpu.fastest_maps(log) == "1.0140 scores | 0.5500 map kernel, 3 stages"
    assert gpu.fastest_maps("no GPU\n") == "no GPU"


def measured(queue: Queue, name: str, part: str, case: dict[str, Any]) -> None:
    """Writes the file that a benchmark would write."""
    outcomes = thresholds.evaluate({part: [case]}, "cuda")
    content = {
        "environment": {
            "device_name": "NVIDIA H200",
            "date": "2026-01-01",
            "versions": {**MACHINE.versions, "numpy": "1"},
        },
        "settings": {"seconds": 4},
        "parts": {part: [case]},
        "thresholds": [outcome.as_dict() for outcome in outcomes],
    }
    folder = queue.folder(ENTRIES[name])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overhead-nvidia-h200.json").write_text(json.dumps(content))


LOSS = {
    "name": thresholds.LOSS,
    "dtype": "float32",
    "ratios": {
        "eager_over_ours": {"median": 12.0, "low": 11.0, "high": 13.0, "count": 9},
        "launches": {"median": 4},
    },
}
STEP = {"name": thresholds.STEP, "dtype": "bfloat16", "ratios": {}}


def queue_in(folder: Path) -> Queue:
    return Queue(list(ENTRIES.values()), folder, MACHINE, words={}, seconds=0.0)


def test_the_table_shows_every_target(tmp_path: Path) -> None:
    queue = queue_in(tmp_path)
    measured(queue, "policy", "policy", LOSS)
    lines = gpu.targets(gpu.merge(queue))
    verdicts = {line.split()[4]: line.split()[0] for line in lines}
    assert verdicts["eager_over_ours"] == "reached"
    assert verdicts["launches"] == "MISSED"
    assert verdicts["compiled_over_ours"] == "undecided"  # not measured
    text = gpu.table([Result("tests", "FAILED", 3.0, "1 failed"), Result("suite", "no time", 0.0, "")], lines, 3.0)
    assert "FAILED" in text
    assert "no time" in text
    assert all(line in text for line in lines)
    assert gpu.targets(None) == ["no benchmark result"]


def test_results_of_several_runs_with_the_same_kernels_are_merged(tmp_path: Path) -> None:
    assert gpu.merge(queue_in(tmp_path)) is None
    queue = queue_in(tmp_path)
    measured(queue, "step", "end-to-end", STEP)
    gpu.merge(queue)
    (queue.folder(ENTRIES["step"]) / "overhead-nvidia-h200.json").unlink()  # as on a machine with the file alone
    measured(queue, "policy", "policy", LOSS)
    gpu.merge(queue)
    merged = gpu.merge(queue)
    written = json.loads((tmp_path / "queue-nvidia-h200.json").read_text())
    assert written == merged
    assert list(written["parts"]) == ["policy", "end-to-end"]
    assert written["measured"].keys() == {"policy", "end-to-end"}
    assert written["settings"].keys() == {"policy", "step"}
    assert len(written["thresholds"]) == len(thresholds.evaluate({"policy": [LOSS], "end-to-end": [STEP]}, "cuda"))
    queue.machine = Machine("NVIDIA H200", {"torch": "3", "triton": "3"})
    assert gpu.merge(queue) is None
    queue.machine, queue.kernels = MACHINE, "other kernels"
    measured(queue, "policy", "policy", LOSS)
    merged = gpu.merge(queue)
    assert merged is not None
    assert list(merged["parts"]) == ["policy"]


def test_the_list_shows_what_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def record(entry: Entry, **changes: Any) -> dict[str, Any]:
        digest = entry_digest(entry, kernels_digest())
        values = {"name": entry.name, "outcome": "ok", "digest": digest, "device": MACHINE.device}
        return {**values, "versions": MACHINE.versions, "detail": "all well", "date": "2026-01-02T03", **changes}

    records = Records(tmp_path / "queue.jsonl")
    records.append(record(ENTRIES["smoke"]))
    records.append(record(ENTRIES["tests"], digest="other kernels"))
    records.append(record(ENTRIES["gluon"], outcome="interrupted"))
    shown = gpu.listing(list(ENTRIES.values()), records, None).splitlines()
    states = {a.split()[0]: b.strip() for a, b in zip(shown[::2], shown[1::2], strict=True)}
    assert states.pop("smoke") == "ok, 2026-01-02, NVIDIA H200: all well"
    assert set(states.values()) == {"not recorded"}
    assert "not recorded" in gpu.listing([ENTRIES["smoke"]], records, Machine("another", MACHINE.versions))
    assert "all well" in gpu.listing([ENTRIES["smoke"]], records, MACHINE)
    if not torch.cuda.is_available():
        assert gpu.main(["--list", "--only", "smoke", "--out", str(tmp_path)]) == 0
        assert "all well" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcomes", "interrupted", "status"),
    [(["ok", "no time"], False, 0), (["ok", "FAILED"], False, 1), (["missing"], False, 1), (["ok"], True, 130)],
)
def test_the_exit_status_is_that_of_the_worst_outcome(
    outcomes: list[str], interrupted: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(queue: Queue) -> list[Result]:
        queue.interrupted = interrupted
        return [Result("smoke", outcome, 1.0, "") for outcome in outcomes]

    monkeypatch.setattr(gpu, "cuda_problem", lambda: "")
    monkeypatch.setattr(gpu, "this_machine", lambda: MACHINE)
    monkeypatch.setattr(Queue, "run", run)
    assert gpu.main(["--out", str(tmp_path)]) == status


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_run_without_a_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        gpu.main([])
    assert status.value.code == 2
    assert "no GPU that torch" in capsys.readouterr().err


def test_the_time_limit_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "0"])
    assert "--minutes must be positive, got 0" in capsys.readouterr().err
