"""Everything that needs a GPU, in one run: python -m tools.gpu --out DIR

The tests of every kernel and, beside them, the same kernels at small sizes under compute-sanitizer; then, one after the
other, the tuning and the benchmarks. Each step has a time limit, and all of them together stay under nine minutes.
Logs, JSON and plots go to DIR; a short table comes last. The exit status is 1 if a test fails, a sanitizer finds
something or a step does not run; targets that are not reached are in the table and leave it at 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 530.0  # seconds
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"


@dataclass(frozen=True)
class Step:
    """A command, how long it may take, and what to say of its output."""

    name: str
    command: list[str]
    seconds: float
    summary: Callable[[str], str]
    timed: bool = True  # has the machine to itself
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    step: str
    outcome: str  # "ok", "FAILED" or "too slow"
    seconds: float
    detail: str

    @property
    def good(self) -> bool:
        return self.outcome == "ok"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for logs and results")
    parser.add_argument("--only", action="append", choices=NAMES, help="run this step alone (may be repeated)")
    options = parser.parse_args(arguments)
    problem = cuda_problem()
    if problem:
        parser.error(problem)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def result_of(step: Step) -> Result:
        left = TOTAL - (time.monotonic() - started)
        result = run(step, out, min(step.seconds, left))
        print(f"{step.name}: {result.outcome}, {result.detail}", flush=True)
        return result

    chosen = [step for step in steps(out) if not options.only or step.name in options.only]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(result_of, [step for step in chosen if not step.timed]))
    results += [result_of(step) for step in chosen if step.timed]
    if sanitizer() is None and not options.only:
        results.append(Result("sanitizers", "FAILED", 0.0, "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin"))
    print(table(results, targets(out), time.monotonic() - started))
    return 0 if all(result.good for result in results) else 1


def cuda_problem() -> str:
    import torch

    if torch.cuda.is_available():
        return ""
    return f"no GPU that torch {torch.__version__} can use (its CUDA version: {torch.version.cuda})"


NAMES = ("tests", "memcheck", "racecheck", "tuning", "overhead", "suite")


def steps(out: Path) -> list[Step]:
    """What runs, in order: what is wrong comes before what is slow."""
    python = sys.executable
    parallel = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *parallel, "tests"]
    # Inductor compiles in the tests' own processes: its pool of others kept pytest waiting for their end.
    found = [Step("tests", tests, 220.0, last_line, timed=False, environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"})]
    tool = sanitizer()
    if tool is not None:
        # An allocation for each tensor, so that reading past one is seen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for name in ("memcheck", "racecheck"):
            # Nothing but this program: Triton's compiler would run in it some times slower.
            options = ["--tool", name, "--error-exitcode", "9", "--target-processes", "application-only"]
            options += ["--launch-timeout", "120"]  # while the tests take all processors
            command = [tool, *options, python, "tests/small_calls.py"]
            found.append(Step(name, command, 220.0, findings, timed=False, environment=alone))
    tune = [python, "-m", "tools.tune_attention", "--out", str(out), "--seconds", "90"]
    overhead = [python, "benchmarks/overhead.py", "--thorough", "--out", str(out), "--seconds", "4"]
    suite = [python, "-m", "pytest", "-q", "benchmarks/test_policy.py", "benchmarks/test_attention.py"]
    suite += ["-p", "no:cacheprovider", f"--benchmark-json={out / 'benchmark-suite.json'}"]
    return [
        *found,
        Step("tuning", tune, 120.0, last_line),
        Step("overhead", overhead, 150.0, last_line, environment={"STAR_KERNELS_TUNED": str(out)}),
        Step("suite", suite, 60.0, last_line, environment={"STAR_KERNELS_TUNED": str(out)}),
    ]


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(CUDA_BIN))


def run(step: Step, out: Path, seconds: float) -> Result:
    """Runs a step; its output goes to a log of its name."""
    started = time.monotonic()
    log = out / f"{step.name}.log"
    if seconds <= 0:
        return Result(step.name, "too slow", 0.0, "no time was left for it")
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **step.environment},
            start_new_session=True,  # so that its children end with it
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = None
    spent = time.monotonic() - started
    text = log.read_text(errors="replace")
    if status is None:
        return Result(step.name, "too slow", spent, f"stopped after {spent:.0f} s; {step.summary(text)}")
    return Result(step.name, "ok" if status == 0 else "FAILED", spent, step.summary(text))


def last_line(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def findings(text: str) -> str:
    """What a sanitizer says last of itself, and the program under it."""
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)
    return summaries[-1] if summaries else last_line(text)


def targets(out: Path) -> list[str]:
    """The thresholds of the newest benchmark result in the folder, a line each."""
    files = sorted(out.glob("overhead-*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return ["no benchmark result"]
    lines = []
    for row in json.loads(files[-1].read_text())["thresholds"]:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.4g}"
        if row["low"] is not None:
            measured += f" [{row['low']:.4g}, {row['high']:.4g}]"
        verdict = {"held": "reached", "FAILED": "MISSED"}.get(row["verdict"], row["verdict"])
        lines.append(f"{verdict:<9} {row['case']:<33} {row['ratio']:<26} {row['limit']:<8} {measured}")
    return lines


def table(results: list[Result], lines: list[str], seconds: float) -> str:
    rows = [f"{r.step:<10} {r.outcome:<9} {r.seconds:>6.0f} s  {r.detail[:90]}" for r in results]
    return "\n".join(["", *lines, "", *rows, f"{seconds:.0f} s in all"])


if __name__ == "__main__":
    sys.exit(main())
