"""Runs what requires a GPU, most valuable first: python -m tools.gpu --out DIR

The queue has a smoke test of all kernels, benchmarks, tuning, tests and compute-sanitizer. A run takes what fits into
--minutes and skips entries with a recorded result: one for the same sources of the kernels, command, device and
versions. Every outcome is appended to DIR/queue.jsonl; logs and results are in DIR/queue, and the benchmark results
of these kernels, of all runs, in DIR/queue-DEVICE.json. Ctrl-C ends the run. A table is printed at the end. The exit
status is 1 if the result of an entry is a failure. Benchmark targets that are missed do not change it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.device_queue import (
    INTERRUPTED,
    NO_TIME,
    OK,
    ROOT,
    Entry,
    Machine,
    Queue,
    Records,
    Result,
    entry_digest,
    kernels_digest,
    last_line,
)

CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
TUNED_SHAPES = 5  # of tools/tune_attention.py


def main(arguments: list[str] | None = None) -> int:
    names = [entry.name for entry in entries()]
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="output folder (default: benchmarks/results)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the run (default: 8)")
    parser.add_argument("--only", action="append", choices=names, help="run only this entry (may be repeated)")
    parser.add_argument("--again", action="store_true", help="also run entries with a recorded result")
    parser.add_argument("--list", action="store_true", help="show the queue and its recorded results, and run nothing")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    chosen = [entry for entry in entries() if not options.only or entry.name in options.only]
    out, problem = options.out.resolve(), cuda_problem()
    if options.list:
        print(listing(chosen, Records(out / "queue.jsonl"), None if problem else this_machine()))
        return 0
    if problem:
        parser.error(problem)
    started = time.monotonic()
    queue = Queue(chosen, out, this_machine(), words=words(), seconds=60 * options.minutes, again=options.again)
    results = queue.run()
    merged = merge(queue)
    print(table(results, targets(merged), time.monotonic() - started))
    if queue.interrupted:
        return 130
    return int(any(result.outcome not in (OK, NO_TIME) for result in results))


def entries() -> list[Entry]:
    """The queue, most valuable first."""
    # With one compile thread, Inductor starts no pool of processes, for whose end pytest would wait.
    tests = ("{python}", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "{xdist}", "tests")
    tune = ("{python}", "-m", "tools.tune_attention")
    variants = ("{python}", "-m", "tools.map_variants")
    compiles = tuple((*tune, "--compile", str(number), "--seconds", "55") for number in range(TUNED_SHAPES))
    suite = ("{python}", "-m", "pytest", "-q", "benchmarks/test_policy.py", "benchmarks/test_attention.py")
    return [
        Entry(
            "smoke",
            ("{python}", "-m", "tools.gpu_smoke", "--seconds", "50"),
            60.0,
            "Whether every kernel runs on this device and agrees with the reference; if not, what to repair first.",
            timed=False,
        ),
        Entry(
            "hopper-right",
            ("{python}", "-m", "tools.hopper_right", "--seconds", "100"),
            110.0,
            "Whether the CUDA kernel for Hopper is right in all its shapes; if not, the first wrong tile and operand.",
            summary=hopper_verdict,
            timed=False,
        ),
        Entry(
            "hopper-speed",
            ("{python}", "-m", "tools.hopper_speed", "--out", "{folder}", "--seconds", "15"),
            120.0,
            "Whether it is as fast as cuDNN, what maps add, and which of its shapes is the default.",
            summary=hopper_times,
        ),
        Entry(
            "fused",
            ("{python}", "-m", "tools.fused_loss", "--out", "{folder}", "--seconds", "20"),
            75.0,
            "Whether the loss and its gradient in one launch are right, and which cluster and block are the fastest.",
            summary=fused_times,
            warm_up=(("{python}", "-m", "tools.fused_loss", "--out", "{folder}", "--seconds", "1", "--batch", "2"),),
        ),
        Entry(
            "backends",
            ("{python}", "-m", "tools.check_backends"),
            60.0,
            "Whether captures keep the output of every attention backend that is installed, and have its maps.",
            timed=False,
        ),
        benchmark("host", 45.0, "Whether a call costs the host as little as planned.", "host"),
        benchmark(
            "policy",
            60.0,
            "Whether the policy loss is faster than torch.compile, in how many launches, and near the speed of a copy.",
            "policy",
            options=("--thorough", "--seconds", "4"),
        ),
        benchmark(
            "capture",
            60.0,
            "What captured maps of the default blocks, and of all, add to the forward pass of SD3.5-M.",
            "capture",
            options=("--repetitions", "40"),
        ),
        benchmark(
            "step",
            100.0,
            "What STAR adds to a rollout-and-update step.",
            "end-to-end",
            options=("--repetitions", "16"),
        ),
        Entry(
            "map-variants",
            (*variants, "--out", "{folder}"),
            90.0,
            "Which variant of the kernels for maps is the fastest, and whether dependent launches pay.",
            summary=fastest_maps,
            warm_up=tuple((*variants, "--compile", part) for part in ("late", "keys", "scores", "vendor")),
        ),
        benchmark(
            "compiled",
            170.0,
            "What captured maps add to a forward pass and a step of a compiled SD3.5-M.",
            "compiled",
            options=("--repetitions", "16"),
        ),
        benchmark(
            "attention",
            130.0,
            "What maps add to attention forward and backward, and which variant of the kernels is the fastest.",
            "attention",
            "backward",
            options=("--thorough", "--seconds", "4"),
        ),
        Entry(
            "gluon",
            ("{python}", "-m", "tools.gluon_forward"),
            60.0,
            "Whether the Hopper kernel in Gluon is right, and whether it is as fast as cuDNN.",
            summary=gluon_times,
        ),
        Entry(
            "tuning",
            (*tune, "--out", "{folder}", "--seconds", "75"),
            100.0,
            "Which kernels and tiles attention uses on this device.",
            warm_up=compiles,
        ),
        Entry(
            "tests",
            tests,
            220.0,
            "Whether all kernels meet their numeric contract on this device.",
            timed=False,
            environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        ),
        *(
            sanitizer_entry(tool, finds)
            for tool, finds in (
                ("memcheck", "accesses memory outside its tensors"),
                ("racecheck", "has a race in shared memory"),
                ("initcheck", "reads uninitialised memory"),
                ("synccheck", "uses a barrier wrongly"),
            )
        ),
        Entry(
            "suite",
            (*suite, "-p", "no:cacheprovider", "--benchmark-json={folder}/benchmark-suite.json"),
            60.0,
            "The times of single kernels, for comparison with other versions of the code.",
        ),
    ]


def benchmark(name: str, seconds: float, decides: str, *parts: str, options: tuple[str, ...] = ()) -> Entry:
    """An entry that runs parts of benchmarks/overhead.py."""
    command = ["{python}", "benchmarks/overhead.py", "--out", "{folder}"]
    for part in parts:
        command += ["--only", part]
    # The warm-up has the same kernels. Its batches are small, because all warm-ups share the memory of the device.
    warm_up = (*command, *(("--thorough",) if "--thorough" in options else ()), "--batch", "2", "--repetitions", "1")
    return Entry(name, (*command, *options), seconds, decides, warm_up=(warm_up,))


def sanitizer_entry(tool: str, finds: str) -> Entry:
    # The sanitizer is not applied to child processes, such as Triton's compiler, which it would slow down.
    options = ("--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only")
    return Entry(
        tool,
        # The launch timeout is in seconds; the tests use all processors at the same time.
        ("{compute-sanitizer}", *options, "--launch-timeout", "120", "{python}", "tests/small_calls.py"),
        220.0,
        f"Whether a kernel {finds}.",
        summary=findings,
        timed=False,
        # Each tensor has its own allocation, so that the sanitizer sees accesses past its end.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def words() -> dict[str, Sequence[str]]:
    """The words of commands that depend on the machine."""
    name = "compute-sanitizer"
    jobs = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return {
        "{python}": [sys.executable],
        "{compute-sanitizer}": [shutil.which(name) or shutil.which(name, path=str(CUDA_BIN)) or name],
        "{xdist}": jobs,
    }


def cuda_problem() -> str:
    """Why torch cannot use a GPU; empty if it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    return f"no GPU that torch {torch.__version__} can use (its CUDA version: {torch.version.cuda})"


def this_machine() -> Machine:
    import torch

    from benchmarks.reporting import environment

    described = environment.describe(torch.device("cuda"))
    versions = {name: described["versions"][name] for name in ("torch", "triton")}
    return Machine(described["device_name"], versions, described["commit"])


def findings(text: str) -> str:
    """The last summary line of a sanitizer; without one, the last line of the output."""
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)
    return summaries[-1] if summaries else last_line(text)


def fused_times(text: str) -> str:
    """What is wrong with the kernels of one launch, or else the times of each shape; else the last line."""
    failed = re.findall(r"^FAILED: (.*)$", text, re.MULTILINE)
    return " | ".join(failed or re.findall(r"fastest (.*)$", text, re.MULTILINE)) or last_line(text)


def hopper_verdict(text: str) -> str:
    """The shapes of the kernel that are wrong, each with its first problem; else the last line of the output."""
    failed = re.findall(r"^(head dim .*): FAILED\n(?:ok .*\n)*(.*)", text, re.MULTILINE)
    return " | ".join(f"{shape}: {problem}" for shape, problem in failed) or last_line(text)


def hopper_times(text: str) -> str:
    """The ratios of the kernel to cuDNN without and with maps, of each shape; else the last line of the output."""
    pattern = r"^  hopper +[\d.]+ us +([\d.]+)[^\n]*\n  hopper, maps +[\d.]+ us +([\d.]+)"
    return " | ".join(" ".join(pair) for pair in re.findall(pattern, text, re.MULTILINE)) or last_line(text)


def gluon_times(text: str) -> str:
    """The times of all variants of the Gluon kernel; without one, the last line of the output."""
    return " | ".join(re.findall(r"agrees with PyTorch; (.*)", text)) or last_line(text)


def fastest_maps(text: str) -> str:
    """The fastest variant with maps of each comparison, and its ratio; without one, the last line of the output."""
    found = []
    for block in re.split(r"\n(?=\S)", text):
        rows = re.findall(r"^  (.+?) +[\d.]+ us  ([\d.]+)", block, re.MULTILINE)[1:]
        if rows:
            name, ratio = min(rows, key=lambda row: float(row[1]))
            found.append(f"{ratio} {name}")
    return " | ".join(found) or last_line(text)


def merge(queue: Queue) -> dict[str, Any] | None:
    """Adds the benchmark results of the queue's entries to the file of this device, and returns its content.

    A file of other kernels or versions is replaced. Parts that were measured by earlier runs with these are kept.
    """
    from benchmarks.overhead import PARTS
    from benchmarks.reporting import environment, tables

    def same_versions(result: dict[str, Any]) -> bool:
        return queue.machine.versions.items() <= result["environment"]["versions"].items()

    merged: dict[str, Any] | None = None
    device = environment.slug({"device": "cuda", "device_name": queue.machine.device})
    path = queue.out / f"queue-{device}.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        merged = earlier if earlier.get("kernels") == queue.kernels and same_versions(earlier) else None
    for entry in queue.entries:
        for file in sorted(queue.folder(entry).glob(f"overhead-{device}.json")):
            found = json.loads(file.read_text(encoding="utf-8"))
            if not same_versions(found):
                continue
            if merged is None:
                merged = {"kernels": queue.kernels, "settings": {}, "parts": {}, "measured": {}, "thresholds": []}
            merged["environment"] = found["environment"]
            merged["settings"][entry.name] = found["settings"]
            merged["parts"].update(found["parts"])
            merged["measured"].update(dict.fromkeys(found["parts"], found["environment"]["date"]))
            merged["thresholds"] = [row for row in merged["thresholds"] if row["part"] not in found["parts"]]
            merged["thresholds"] += found["thresholds"]
    if merged is not None:
        order = sorted(merged["parts"], key=lambda part: PARTS.index(part) if part in PARTS else len(PARTS))
        merged["parts"] = {part: merged["parts"][part] for part in order}
        tables.write_json(path, merged)
    return merged


def targets(merged: dict[str, Any] | None) -> list[str]:
    """A line for each target of the benchmarks."""
    if merged is None:
        return ["no benchmark result"]
    lines = []
    for row in merged["thresholds"]:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.4g}"
        if row["low"] is not None:
            measured += f" [{row['low']:.4g}, {row['high']:.4g}]"
        verdict = {"held": "reached", "FAILED": "MISSED"}.get(row["verdict"], row["verdict"])
        lines.append(f"{verdict:<9} {row['case']:<33} {row['ratio']:<26} {row['limit']:<8} {measured}")
    return lines


def table(results: Sequence[Result], lines: Sequence[str], seconds: float) -> str:
    rows = []
    for r in results:
        spent = "" if r.outcome in (NO_TIME, INTERRUPTED) and not r.seconds else f"{r.seconds:.0f} s"
        rows.append(f"{r.name:<12} {r.outcome:<11} {spent:>6}  {'recorded ' * r.recorded}{r.detail}"[:140].rstrip())
    return "\n".join(["", *lines, "", *rows, f"{seconds:.0f} s in total; --again repeats recorded entries"])


def listing(chosen: Sequence[Entry], records: Records, machine: Machine | None) -> str:
    """The entries with their recorded results for these kernels; ``machine`` None shows those of any device."""
    kernels, lines = kernels_digest(), []
    for entry in chosen:
        record = records.result(entry.name, entry_digest(entry, kernels), machine)
        state = "not recorded"
        if record is not None:
            state = (
                f"{record['outcome']}, {record.get('date', '')[:10]}, {record.get('device')}: {record.get('detail')}"
            )
        lines += [f"{entry.name:<12} {entry.seconds:>4.0f} s  {entry.decides}", f"{'':<21}{state}"[:140]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
