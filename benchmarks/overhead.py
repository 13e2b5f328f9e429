"""Measures what attention maps and spatial weights cost on this machine: python benchmarks/overhead.py

The benchmark runs on a GPU if there is one, otherwise on the CPU. It has these parts:

  attention   attention with maps, against attention without maps and other ways to compute the maps
  backward    the backward pass of attention (GPU, or CPU with --thorough)
  policy      the policy loss with and without weights, against Flow-GRPO's loss in PyTorch
  host        the time of each function on tiny tensors, against PyTorch: the cost of Python
  capture     a transformer's forward pass with and without captured maps (GPU, or CPU with --thorough)
  compiled    a forward pass and a step of a transformer compiled by torch.compile (GPU, or CPU with --thorough)
  end-to-end  a rollout-and-update step of STAR, against the same step of plain Flow-GRPO
  epoch       an epoch of star-train with and without STAR, rewards included

It prints a table for each part and a summary at the end, and writes JSON and plots to runs/overhead. A run takes
less than four minutes on two cores, or 14 minutes with --thorough. Ctrl-C stops the run and keeps its results so far.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import the packages of the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler that measures memory
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from benchmarks.parts import attention, backward, host, policy
from benchmarks.parts.request import Request
from benchmarks.reporting import environment, plot, summary, tables
from benchmarks.reporting.thresholds import FAILED, HELD, UNDECIDED, Outcome, evaluate
from benchmarks.timing import progress
from benchmarks.timing.harness import Budget, Extent
from star_kernels.command_line import Parser

PARTS = ("attention", "backward", "policy", "host", "capture", "end-to-end", "compiled", "epoch")
ON_CPU = ("attention", "policy", "host", "end-to-end", "epoch")  # end-to-end includes a capture
# Default run: seconds of each part, including its preparation.
BUDGET = {
    "attention": 45.0,
    "backward": 15.0,
    "policy": 25.0,
    "host": 16.0,
    "capture": 40.0,
    "end-to-end": 75.0,
    "compiled": 150.0,
    "epoch": 40.0,
}
# Thorough run: seconds of each comparison, excluding its checks, and the expected seconds of each part.
SECONDS = {
    "attention": 36.0,
    "backward": 12.0,
    "policy": 12.0,
    "host": 12.0,
    "capture": 40.0,
    "end-to-end": 75.0,
    "compiled": 40.0,
    "epoch": 90.0,
}
EXPECTED = {
    "attention": 170.0,
    "backward": 50.0,
    "policy": 50.0,
    "host": 28.0,
    "capture": 90.0,
    "end-to-end": 120.0,
    "compiled": 240.0,
    "epoch": 110.0,
}
RECORDED = ("only", "device", "dtype", "repetitions", "seconds", "batch", "quick", "thorough")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT = Path(__file__).resolve().parents[1] / "runs" / "overhead"
INTERRUPTED = 130  # exit status of a program stopped by Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    dtypes = [DTYPES[name] for name in options.dtype] if options.dtype else None
    everything = PARTS if device.type == "cuda" or options.thorough else ON_CPU
    chosen = options.only or [part for part in everything if part != "compiled" or can_compile(device)]
    plan = progress.Plan({part: expected(options, part) for part in chosen})
    described = environment.describe(device)
    result: dict[str, Any] = {
        "environment": described,
        "settings": {
            **{name: getattr(options, name) for name in RECORDED},
            "prompts": f"{options.prompts.name if options.prompts else 'built in'} ({len(options.texts)})",
            "tokenizer": options.tokenizer.name if options.tokenizer else "BPE trained on the prompts",
        },
        "seconds": 0.0,
        "complete": False,
        "parts": {},
        "thresholds": [],
    }
    path = options.out / f"overhead-{environment.slug(described)}.json"
    estimate = progress.duration(plan.left)
    print(f"{len(chosen)} parts{estimate and ', ' + estimate}; Ctrl-C stops the run and keeps its results", flush=True)
    print(tables.introduction(described, options.thorough), flush=True)
    started = time.perf_counter()
    progress.set_plan(plan)
    try:
        for part in chosen:
            plan.begin(part)
            for case in measure(part, options, device, dtypes):
                result["parts"].setdefault(part, []).append(case)
                result["seconds"] = round(time.perf_counter() - started, 1)
                result["thresholds"] = [outcome.as_dict() for outcome in evaluate(result["parts"], device.type)]
                tables.write_json(path, result)
                print(tables.case_text(part, case, options.thorough), flush=True)
        result["complete"] = True
    except KeyboardInterrupt:
        print(f"\ninterrupted in part {plan.current!r}", file=sys.stderr)
    finally:
        progress.set_plan(None)
    return finish(result, path, options)


def finish(result: dict[str, Any], path: Path, options: argparse.Namespace) -> int:
    """Writes the results and the plots, prints the summary, and returns the exit status."""
    status = 0 if result["complete"] else INTERRUPTED
    if not result["parts"]:
        print("no part was measured; no file was written")
        return status
    tables.write_json(path, result)
    pictures = plot.draw(path.with_suffix(".png"), result)
    print(f"\n{summary.text(result)}")
    if options.check:
        status = check(evaluate(result["parts"], result["environment"]["device"])) or status
    partial = "" if result["complete"] else "the parts measured before the interruption to "
    print(f"{result['seconds']:.0f} s; wrote {partial}{os.path.relpath(path)} and {len(pictures)} plots")
    return status


def check(outcomes: list[Outcome]) -> int:
    """Prints the outcome of every threshold. Returns 1 if a threshold failed, otherwise 0."""
    if not outcomes:
        print("--check: no threshold applies to the parts that were run", file=sys.stderr)
        return 0
    verdicts = [outcome.verdict for outcome in outcomes]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (HELD, FAILED, UNDECIDED))
    reason = "undecided: the limit lies inside the interval, or there is no interval"
    print(f"\nLIMITS: {counts} ({reason})", *outcomes, "", sep="\n")
    return int(FAILED in verdicts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="overhead.py", description=__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", action="extend", help="run only these parts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", action="extend", help="dtypes of the inputs")
    parser.add_argument(
        "--repetitions", type=_positive, help="number of rounds per comparison; replaces the time limit"
    )
    parser.add_argument("--seconds", type=_positive, help="time limit per comparison, in seconds")
    parser.add_argument("--thorough", action="store_true", help="run more parts at more sizes, for about ten minutes")
    parser.add_argument("--batch", type=_positive, help="batch size (default: set by each part)")
    parser.add_argument("--prompts", type=Path, help='file of prompts: one per line, or JSON lines with a "prompt" key')
    parser.add_argument("--tokenizer", type=Path, help="folder of a fast tokenizer (default: trained on the prompts)")
    parser.add_argument("--out", type=Path, default=OUT, help="output folder (default: runs/overhead)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the results with benchmarks/reporting/thresholds.py; exit with status 1 if a limit fails",
    )
    parser.add_argument(
        "--quick", action="store_true", help="use tiny shapes and few rounds, to check that all parts run"
    )
    options = parser.parse_args(arguments)
    if options.quick and options.thorough:
        parser.error("--quick and --thorough are mutually exclusive")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device: torch {torch.__version__} cannot use {options.device!r} on this machine")
    if "compiled" in (options.only or ()) and not can_compile(device):
        parser.error("--only compiled requires a C++ compiler on a CPU: install g++, or set CXX")
    from benchmarks.variants.prompt_tokens import PromptError, load_tokenizer, read_prompts

    try:  # read the files before the timing starts
        options.texts = read_prompts(options.prompts)
        options.loaded_tokenizer = load_tokenizer(options.tokenizer, options.texts)
    except PromptError as error:
        parser.error(str(error))
    return options


def measure(
    part: str, options: argparse.Namespace, device: torch.device, dtypes: list[torch.dtype] | None
) -> Iterator[dict[str, Any]]:
    """Yields the results of a part case by case, as they are measured."""
    extent: Extent = "quick" if options.quick else "thorough" if options.thorough else "default"
    request = Request(device, dtypes, options.batch, budget_of(options, part), extent)
    if part == "attention":
        return attention.measure(request)
    if part == "backward":
        return backward.measure(request)
    if part == "policy":
        return policy.measure(request)
    if part == "host":
        return host.measure(request)
    # The other parts import diffusers, which takes seconds.
    if part == "capture":
        from benchmarks.parts import capture

        return capture.measure(request)
    if part == "end-to-end":
        from benchmarks.parts import end_to_end

        return end_to_end.measure(request, prompts=options.texts, tokenizer=options.loaded_tokenizer)
    if part == "compiled":
        from benchmarks.parts import compiled

        return compiled.measure(request, prompts=options.texts, tokenizer=options.loaded_tokenizer)
    from benchmarks.parts import epoch

    return epoch.measure(request)


def budget_of(options: argparse.Namespace, part: str) -> Budget:
    if options.repetitions:
        return Budget(options.repetitions)
    if options.quick:
        return Budget(3, seconds=1.0)
    if options.seconds or options.thorough:
        return Budget(1000, seconds=options.seconds or SECONDS[part])
    return Budget(1000, until=time.perf_counter() + BUDGET[part])


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can generate code for the device."""
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def expected(options: argparse.Namespace, part: str) -> float:
    """Expected duration of a part on two cores, in seconds; infinite if it is not known."""
    if options.repetitions or options.seconds:
        return math.inf
    if options.quick:
        return 10.0
    return EXPECTED[part] if options.thorough else BUDGET[part]


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
