"""tools.device_queue with small commands: order, records, time limits, failures and interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools import device_queue as queues
from tools.device_queue import Entry, Machine, Queue, Records

MACHINE = Machine("a device", {"torch": "2", "triton": "3"}, "abc")
WAIT = "import signal; signal.pause()"


class Clock:
    """A clock that only advances when it is told to."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> str:
        self.seconds += seconds
        return "done"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of sources, in which the commands run."""
    for name in ("csrc/kernel.cu", "star_kernels/ops.py", "star_kernels/attention/tuned/device.json"):
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "sources"


def entry(name: str, code: str = "", *, seconds: float = 60.0, **options: Any) -> Entry:
    """An entry that appends its name to the file ``ran`` and runs the code."""
    start = f"open('ran', 'a').write('{name} '); print('first'); print('=== {name} done ===', flush=True); "
    return Entry(name, ("{python}", "-c", start + code), seconds, "Nothing.", **options)


def queue_of(root: Path, entries: Sequence[Entry], **options: Any) -> Queue:
    options = {"seconds": 600.0, "now": Clock(), "machine": MACHINE, **options}
    machine = options.pop("machine")
    return Queue(
        entries, root.parent / "out", machine, words={"{python}": [sys.executable, "-S"]}, root=root, **options
    )


def outcomes(queue: Queue) -> dict[str, str]:
    return {result.name: result.outcome for result in queue.run()}


def ran(root: Path) -> list[str]:
    """The entries that have run since the last call."""
    path = root / "ran"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def records(root: Path) -> list[dict[str, Any]]:
    return list(Records(root.parent / "out" / "queue.jsonl").read())


def test_entries_run_in_order_and_a_failure_does_not_stop_the_rest(root: Path) -> None:
    queue = queue_of(root, [entry("b"), entry("a", "raise SystemExit(3)"), entry("c")])
    assert outcomes(queue) == {"b": "ok", "a": "FAILED", "c": "ok"}
    assert ran(root) == ["b", "a", "c"]
    assert [(r["name"], r["outcome"], r["detail"]) for r in records(root)] == [
        ("b", "ok", "b done"),
        ("a", "FAILED", "a done"),
        ("c", "ok", "c done"),
    ]
    for record in records(root):
        assert (record["commit"], record["device"], record["versions"]) == ("abc", "a device", MACHINE.versions)
        assert record.keys() >= {"seconds", "digest", "date"}
    assert "first" in (queue.folder(queue.entries[1]) / "a.log").read_text()


def test_a_command_that_does_not_exist_and_a_summary_that_fails_do_not_stop_the_rest(root: Path) -> None:
    def broken(text: str) -> str:
        raise ValueError("no such number")

    found = [Entry("missing", ("/nowhere/command",), 60.0, ""), entry("broken", summary=broken), entry("c")]
    assert outcomes(queue_of(root, found)) == {"missing": "missing", "broken": "FAILED", "c": "ok"}
    assert "no such number" in records(root)[1]["detail"]
    assert outcomes(queue_of(root, found))["missing"] == "missing"  # tried again: this is not a result
    assert [r["name"] for r in records(root)] == ["missing", "broken", "c", "missing"]


def test_a_command_that_does_not_accept_its_arguments_has_no_result(root: Path) -> None:
    found = [entry("a", "import argparse; argparse.ArgumentParser().parse_args(['--new'])"), entry("b")]
    for _ in range(2):
        assert outcomes(queue_of(root, found)) == {"a": "missing", "b": "ok"}
    assert ran(root) == ["a", "b", "a"]
    assert "unrecognized arguments: --new" in records(root)[0]["detail"]


def test_entries_with_a_result_for_the_same_kernels_are_skipped(root: Path) -> None:
    found = [entry("good"), entry("bad", "raise SystemExit(1)")]
    queue_of(root, found).run()
    assert ran(root) == ["good", "bad"]
    results = queue_of(root, found).run()
    assert ran(root) == []
    assert [(r.outcome, r.recorded) for r in results] == [("ok", True), ("FAILED", True)]
    queue_of(root, found, again=True).run()
    assert ran(root) == ["good", "bad"]
    queue_of(root, [entry("new"), *found]).run()
    assert ran(root) == ["new"]


@pytest.mark.parametrize("name", ["csrc/kernel.cu", "star_kernels/ops.py", "star_kernels/attention/tuned/device.json"])
def test_a_result_counts_only_for_the_same_sources(root: Path, name: str) -> None:
    found = [entry("a")]
    queue_of(root, found).run()
    (root / name).write_text("changed")
    assert outcomes(queue_of(root, found)) == {"a": "ok"}
    assert ran(root) == ["a", "a"]
    (root / "docs.md").write_text("not a kernel")
    queue_of(root, found).run()
    assert ran(root) == []


def test_a_result_counts_only_for_the_same_command_device_and_versions(root: Path) -> None:
    queue_of(root, [entry("a")]).run()
    assert ran(root) == ["a"]
    others = [
        ([entry("a", "pass")], MACHINE),
        ([entry("a", environment={"X": "1"})], MACHINE),
        ([entry("a")], replace(MACHINE, device="another")),
        ([entry("a")], replace(MACHINE, versions={"torch": "2", "triton": "4"})),
    ]
    for found, machine in others:
        queue_of(root, found, machine=machine).run()
        assert ran(root) == ["a"]
    queue_of(root, [entry("a", seconds=1.0)], machine=replace(MACHINE, commit="def")).run()
    assert ran(root) == []


def test_a_run_takes_what_fits_into_its_time(root: Path) -> None:
    clock = Clock()
    found = [
        entry("a", seconds=50.0, summary=lambda text: clock.advance(30.0)),
        entry("long", seconds=80.0),
        entry("b", seconds=70.0, summary=lambda text: clock.advance(65.0)),
        entry("c", seconds=6.0),
        entry("d", seconds=5.0),
    ]
    queue = queue_of(root, found, seconds=100.0, now=clock)
    assert outcomes(queue) == {"a": "ok", "long": "no time", "b": "ok", "c": "no time", "d": "ok"}
    assert ran(root) == ["a", "b", "d"]
    assert queue_of(root, found, seconds=100.0, now=clock).run()[1].outcome == "ok"
    assert ran(root) == ["long", "c"]


def test_an_entry_is_stopped_at_its_limit(root: Path) -> None:
    queue = queue_of(root, [entry("slow", WAIT, seconds=0.0), entry("b")])
    assert outcomes(queue) == {"slow": "too slow", "b": "ok"}
    assert [r["outcome"] for r in records(root)] == ["too slow", "ok"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_ends_the_run_with_what_it_has(root: Path, name: str) -> None:
    interrupt = f"import os, signal; os.kill(os.getppid(), signal.{name}); signal.pause()"
    found = [entry("a"), entry("b", interrupt), entry("c")]
    queue = queue_of(root, found)
    assert outcomes(queue) == {"a": "ok", "b": "interrupted", "c": "interrupted"}
    assert queue.interrupted
    assert [(r["name"], r["outcome"]) for r in records(root)] == [("a", "ok"), ("b", "interrupted")]
    assert ran(root) == ["a", "b"]
    assert outcomes(queue_of(root, [found[0], entry("b"), found[2]])) == {"a": "ok", "b": "ok", "c": "ok"}
    assert ran(root) == ["b", "c"]


def test_timed_entries_run_alone_and_the_others_with_their_neighbours() -> None:
    def together(*found: Entry) -> list[list[str]]:
        return [[e.name for e in batch] for batch in queues.batches(found)]

    smoke, tests, check = (entry(name, timed=False) for name in ("smoke", "tests", "check"))
    one = entry("one", warm_up=(("compile",),))
    two = entry("two", warm_up=(("compile", "0"), ("compile", "1")))
    three = entry("three")
    assert together(smoke, one, three, two, tests, check, three) == [
        ["smoke", "one-warm-up", "two-warm-up-0", "two-warm-up-1"],
        ["one"],
        ["three"],
        ["two"],
        ["tests", "check"],
        ["three"],
    ]
    assert together(one, tests) == [["one-warm-up"], ["one"], ["tests"]]
    assert together(three) == [["three"]]
    assert together() == []


def test_warm_ups_run_before_every_timed_entry_and_not_for_recorded_ones(root: Path) -> None:
    def warmed(name: str) -> Entry:
        return entry(name, warm_up=(entry(f"warm-{name}").command,))

    assert outcomes(queue_of(root, [entry("smoke", timed=False), warmed("a"), warmed("b")])) == {
        "smoke": "ok",
        "a": "ok",
        "b": "ok",
    }
    order = ran(root)
    assert set(order[:3]) == {"smoke", "warm-a", "warm-b"}
    assert order[3:] == ["a", "b"]
    queue_of(root, [entry("smoke", timed=False), warmed("a"), warmed("b"), warmed("c")]).run()
    assert ran(root) == ["warm-c", "c"]


def test_lines_that_are_no_records_are_ignored_and_kept(root: Path) -> None:
    path = root.parent / "out" / "queue.jsonl"
    queue_of(root, [entry("a")]).run()
    cut = path.read_text() + '[1]\n{"name": "b", "outc'
    path.write_text(cut)
    queue_of(root, [entry("a"), entry("b")]).run()
    assert ran(root) == ["a", "b"]
    assert [r["name"] for r in records(root)] == ["a", "b"]
    assert path.read_text().startswith(cut + "\n")
    assert json.loads(path.read_text().splitlines()[-1])["name"] == "b"


def test_words_and_the_folder_are_put_into_a_command(tmp_path: Path) -> None:
    command = ("{python}", "-m", "pytest", "{xdist}", "--json={folder}/x.json", "{other}")
    words = {"{python}": ["python3"], "{xdist}": ["-n", "4"]}
    assert queues.expand(command, words, tmp_path) == [
        "python3",
        "-m",
        "pytest",
        "-n",
        "4",
        f"--json={tmp_path}/x.json",
        "{other}",
    ]
    assert "-n" not in queues.expand(command, {**words, "{xdist}": []}, tmp_path)
