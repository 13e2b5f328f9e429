"""Runs commands in order of value within a time limit, skips those with a recorded result, and records every outcome.

The records are lines of JSON. A record belongs to an entry if the kernels' sources, the command, the device and the
versions of torch and triton are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED, TOO_SLOW = "ok", "FAILED", "too slow"
RESULTS = (OK, FAILED, TOO_SLOW)  # an entry with one of these does not run again
MISSING, INTERRUPTED, NO_TIME = "missing", "interrupted", "no time"
USAGE = 2  # exit status of a program that does not accept its arguments, and of pytest if it cannot import the tests
WARM_UP_SECONDS = 75.0


def last_line(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


@dataclass(frozen=True)
class Entry:
    """A command of the queue.

    Attributes:
        name: also the name of its folder of results and of its log.
        command: its arguments. ``{folder}`` in an argument is the folder of results; an argument that is a key of the
            queue's ``words`` is replaced by the words of that key.
        seconds: time limit. The entry starts only if this much time is left.
        decides: what is decided by the result, in one sentence.
        summary: makes a line from the output.
        timed: whether the entry runs alone. Others run together with the neighbouring entries that are not timed.
        environment: additional environment variables.
        warm_up: commands that compile the kernels of the entry. Those of all entries run together, before any timed
            entry.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    decides: str
    summary: Callable[[str], str] = last_line
    timed: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    warm_up: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Machine:
    """Where a result was measured. The commit is recorded, but results of other commits count as well."""

    device: str
    versions: Mapping[str, str | None]  # torch and triton
    commit: str | None = None


@dataclass(frozen=True)
class Result:
    name: str
    outcome: str
    seconds: float
    detail: str
    recorded: bool = False  # by an earlier run


def kernels_digest(root: Path = ROOT) -> str:
    """A digest of all files that the kernels and their launchers are made of."""
    package = root / "star_kernels"
    files = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    files += [*package.rglob("*.py"), *package.rglob("tuned/*.json")]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def entry_digest(entry: Entry, kernels: str) -> str:
    """The digest that the records of an entry have."""
    text = json.dumps([kernels, entry.command, sorted(entry.environment.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Records:
    """The outcomes of all runs, in a file with a line of JSON for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()

    def read(self) -> Iterator[dict[str, Any]]:
        """All records in order. Lines that are not records, such as one that was cut off, are ignored."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and {"name", "outcome", "digest"} <= record.keys():
                    yield record

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock, self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line  # an earlier run was stopped while it wrote
            file.write(line.encode())

    def result(self, name: str, digest: str, machine: Machine | None) -> dict[str, Any] | None:
        """The newest result of an entry; ``machine`` None accepts that of any device and versions."""
        found = None
        for record in self.read():
            same = (record["name"], record["digest"]) == (name, digest) and record["outcome"] in RESULTS
            if same and (machine is None or _measured_on(record, machine)):
                found = record
        return found


def _measured_on(record: dict[str, Any], machine: Machine) -> bool:
    return (record.get("device"), record.get("versions")) == (machine.device, dict(machine.versions))


class Queue:
    """Runs entries in their order, and those that are not timed together with their neighbours.

    Args:
        entries: most valuable first.
        out: folder of the records, and of a folder for each entry with its log and its results.
        machine: this machine.
        words: see :class:`Entry`.
        seconds: time limit of the run.
        again: also run entries that have a result.
        root: folder of the sources, in which the commands run.
        now: the clock.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        out: Path,
        machine: Machine,
        *,
        words: Mapping[str, Sequence[str]],
        seconds: float,
        again: bool = False,
        root: Path = ROOT,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.entries, self.out, self.machine, self.words, self.again = entries, out, machine, words, again
        self.root, self.now = root, now
        self.end = now() + seconds
        self.records = Records(out / "queue.jsonl")
        self.kernels = kernels_digest(root)
        self.results: dict[str, Result] = {}
        self.interrupted = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()

    def folder(self, entry: Entry) -> Path:
        """The folder of the results of an entry, for these kernels."""
        return self.out / "queue" / f"{entry.name}-{entry_digest(entry, self.kernels)}"

    def run(self) -> list[Result]:
        """Runs what is not recorded and fits into the time. Returns a result for each entry, in their order."""
        self.out.mkdir(parents=True, exist_ok=True)
        waiting = [entry for entry in self.entries if not self._is_recorded(entry)]
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run as Ctrl-C does
        try:
            for batch in batches(waiting):
                self._run_together(batch)
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            signal.signal(signal.SIGTERM, before)
        not_run = {e.name: Result(e.name, INTERRUPTED if self.interrupted else NO_TIME, 0.0, "") for e in waiting}
        return [self.results.get(e.name) or not_run[e.name] for e in self.entries]

    def _is_recorded(self, entry: Entry) -> bool:
        record = self.records.result(entry.name, entry_digest(entry, self.kernels), self.machine)
        if record is None or self.again:
            return False
        detail = f"{record.get('date', '')[:10]} {record.get('detail', '')}".strip()
        self.results[entry.name] = Result(entry.name, record["outcome"], record.get("seconds", 0.0), detail, True)
        return True

    def _run_together(self, batch: Sequence[Entry]) -> None:
        left = self.end - self.now()
        started = [entry for entry in batch if entry.seconds <= left]
        if not started:
            return
        with ThreadPoolExecutor(len(started)) as pool:
            try:
                for future in [pool.submit(self._run, entry) for entry in started]:
                    future.result()
            except KeyboardInterrupt:
                self.interrupted = True
                for process in list(self._running):
                    stop(process)
                raise

    def _run(self, entry: Entry) -> None:
        """Runs an entry, prints its outcome and records it. Raises no error."""
        started = self.now()
        try:
            outcome, text = self._outcome(entry)
            detail = entry.summary(text)
        except Exception as problem:
            outcome, detail = FAILED, f"{type(problem).__name__}: {problem}"
        if self.interrupted:
            outcome = INTERRUPTED
        result = Result(entry.name, outcome, self.now() - started, detail)
        self.results[entry.name] = result
        self.records.append(
            {
                "name": entry.name,
                "outcome": outcome,
                "seconds": round(result.seconds, 1),
                "detail": detail,
                "digest": entry_digest(entry, self.kernels),
                "commit": self.machine.commit,
                "device": self.machine.device,
                "versions": dict(self.machine.versions),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )
        print(f"{entry.name}: {outcome}, {result.seconds:.0f} s, {detail}", flush=True)

    def _outcome(self, entry: Entry) -> tuple[str, str]:
        """Runs the command with its output in a log. Returns the outcome and the output."""
        folder = self.folder(entry)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{entry.name}.log"
        with log.open("w") as output:
            try:
                process = subprocess.Popen(
                    expand(entry.command, self.words, folder),
                    cwd=self.root,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **entry.environment},
                    start_new_session=True,  # so that its child processes can be stopped with it
                )
            except OSError as problem:
                return MISSING, str(problem)
            with self._lock:
                self._running.add(process)
            try:
                status: int | None = None if self.interrupted else process.wait(timeout=entry.seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                stop(process)  # also processes that it has left behind
                with self._lock:
                    self._running.discard(process)
        text = log.read_text(errors="replace")
        if status is None:
            return TOO_SLOW, text
        return (OK if status == 0 else MISSING if status == USAGE else FAILED), text


def batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The entries that run together, in order: each timed one alone, and those between two timed ones together.

    All warm-ups are in the first batch, with the entries before the first timed one.
    """
    first = [warm_up for entry in entries for warm_up in warm_ups(entry)]
    for timed, group in groupby(entries, key=lambda entry: entry.timed):
        if not timed:
            yield [*group, *first]
            first = []
            continue
        if first:
            yield first
            first = []
        for entry in group:
            yield [entry]


def warm_ups(entry: Entry) -> list[Entry]:
    """The commands that compile the kernels of an entry, as entries. The smoke test has priority over them."""
    several = len(entry.warm_up) > 1
    return [
        Entry(
            f"{entry.name}-warm-up{f'-{number}' if several else ''}",
            ("nice", *command),
            WARM_UP_SECONDS,
            f"Compiles the kernels of {entry.name}.",
            timed=False,
            environment=entry.environment,
        )
        for number, command in enumerate(entry.warm_up)
    ]


def expand(command: Sequence[str], words: Mapping[str, Sequence[str]], folder: Path) -> list[str]:
    """The arguments to run; see :class:`Entry`."""
    expanded: list[str] = []
    for argument in command:
        expanded += words.get(argument, [argument.replace("{folder}", str(folder))])
    return expanded


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and those that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
