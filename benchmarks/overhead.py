"""What attention maps and spatial weights cost on this machine: python benchmarks/overhead.py

On a GPU if there is one and else on the CPU: attention with maps against attention without and against other ways to
get maps; the weighted policy loss against the one without weights and against Flow-GRPO's arithmetic in PyTorch; a
whole rollout-and-update step with and without STAR; and an epoch of the driver, with its rewards. On a GPU, and with
--thorough, also a transformer's forward pass with and without capture; on a GPU attention's backward pass.

Prints a table for each part as soon as it is measured, and a summary at the end; writes JSON and a plot to
runs/overhead. Takes less than four minutes on two cores, and ten with --thorough. Ctrl-C ends it with what there is.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import the packages of the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is chatty
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from benchmarks.parts import attention, backward, policy
from benchmarks.reporting import environment, plot, summary, tables
from benchmarks.reporting.thresholds import FAILED, HELD, UNDECIDED, Outcome, evaluate
from benchmarks.timing import progress
from benchmarks.timing.harness import Budget, Extent

PARTS = ("attention", "backward", "policy", "capture", "end-to-end", "epoch")
THOROUGH_ON_CPU = ("attention", "policy", "capture", "end-to-end", "epoch")  # attention's backward pass is PyTorch's
ON_CPU = ("attention", "policy", "end-to-end", "epoch")  # the step has a capture in it
# Of each part by default, preparation included.
BUDGET = {"attention": 45.0, "backward": 15.0, "policy": 25.0, "capture": 40.0, "end-to-end": 75.0, "epoch": 40.0}
# Of each comparison of a thorough run, after its checks; and of a whole part, for its announcement.
SECONDS = {"attention": 36.0, "backward": 12.0, "policy": 12.0, "capture": 40.0, "end-to-end": 75.0, "epoch": 90.0}
EXPECTED = {"attention": 170.0, "backward": 50.0, "policy": 50.0, "capture": 90.0, "end-to-end": 120.0, "epoch": 110.0}
RECORDED = ("only", "device", "dtype", "repetitions", "seconds", "batch", "quick", "thorough")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT = Path(__file__).resolve().parents[1] / "runs" / "overhead"
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    dtypes = [DTYPES[name] for name in options.dtype] if options.dtype else None
    everything = PARTS if device.type == "cuda" else THOROUGH_ON_CPU if options.thorough else ON_CPU
    chosen = options.only or everything
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
    takes = progress.duration(plan.left)
    print(f"{len(chosen)} parts{takes and ', ' + takes}; Ctrl-C ends the run with what it has measured", flush=True)
    print(tables.beginning(described, options.thorough), flush=True)
    started = time.perf_counter()
    progress.follow(plan)
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
        progress.follow(None)
    return finish(result, path, options)


def finish(result: dict[str, Any], path: Path, options: argparse.Namespace) -> int:
    """Summary, plot and verdict of what was measured."""
    status = 0 if result["complete"] else INTERRUPTED
    if not result["parts"]:
        print("nothing was measured: no file was written")
        return status
    tables.write_json(path, result)
    plot.draw(path.with_suffix(".png"), result)
    print(f"\n{summary.text(result)}")
    if options.check:
        status = check(evaluate(result["parts"], result["environment"]["device"])) or status
    told = "" if result["complete"] else "the parts before the interruption: "
    print(f"{result['seconds']:.0f} s; wrote {told}{os.path.relpath(path)} and .png")
    return status


def check(outcomes: list[Outcome]) -> int:
    """Prints every threshold; 1 if the whole interval of a figure lies beyond one."""
    if not outcomes:
        print("--check: no threshold is about what was run", file=sys.stderr)
        return 0
    verdicts = [outcome.verdict for outcome in outcomes]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (HELD, FAILED, UNDECIDED))
    print(f"\nLIMITS: {counts} (the limit is inside the interval, or there is no interval)", *outcomes, "", sep="\n")
    return int(FAILED in verdicts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part alone (may be repeated)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; each part has its default")
    parser.add_argument("--repetitions", type=_positive, help="rounds of each comparison, instead of a time limit")
    parser.add_argument("--seconds", type=_positive, help="time of each comparison, instead of each part's own")
    parser.add_argument("--thorough", action="store_true", help="all parts, at more sizes and for longer: ten minutes")
    parser.add_argument("--batch", type=_positive, help="batch size, instead of each part's own")
    parser.add_argument("--prompts", type=Path, help='prompts, one a line, or JSON lines with a "prompt" each')
    parser.add_argument("--tokenizer", type=Path, help="folder of a fast tokenizer (default: trained on the prompts)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for JSON and plot (default: runs/overhead)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="also compare the figures with the limits of benchmarks/reporting/thresholds.py: status 1 if one fails",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: shows that everything runs")
    options = parser.parse_args(arguments)
    if options.quick and options.thorough:
        parser.error("--quick and --thorough exclude each other")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device: this torch cannot use {options.device!r} here")
    if device.type == "cpu" and "backward" in (options.only or ()):
        parser.error("--only backward needs a GPU: on a CPU the backward pass of attention is PyTorch's own")
    from benchmarks.variants.prompt_tokens import PromptError, load_tokenizer, read_prompts

    try:  # before anything is timed
        options.texts = read_prompts(options.prompts)
        options.loaded_tokenizer = load_tokenizer(options.tokenizer, options.texts)
    except PromptError as error:
        parser.error(str(error))
    return options


def measure(
    part: str, options: argparse.Namespace, device: torch.device, dtypes: list[torch.dtype] | None
) -> Iterator[dict[str, Any]]:
    """The cases of a part, each as soon as it is measured."""
    extent: Extent = "quick" if options.quick else "thorough" if options.thorough else "default"
    common = device, dtypes, options.batch, budget_of(options, part), extent
    if part == "attention":
        return attention.measure(*common)
    if part == "backward":
        return backward.measure(*common)
    if part == "policy":
        return policy.measure(*common)
    # These import diffusers, which takes seconds.
    if part == "capture":
        from benchmarks.parts import capture

        return capture.measure(*common)
    if part == "end-to-end":
        from benchmarks.parts import end_to_end

        return end_to_end.measure(*common, prompts=options.texts, tokenizer=options.loaded_tokenizer)
    from benchmarks.parts import epoch

    return epoch.measure(*common)


def budget_of(options: argparse.Namespace, part: str) -> Budget:
    if options.repetitions:
        return Budget(options.repetitions)
    if options.quick:
        return Budget(3, seconds=1.0)
    if options.seconds or options.thorough:
        return Budget(1000, seconds=options.seconds or SECONDS[part])
    return Budget(1000, until=time.perf_counter() + BUDGET[part])


def expected(options: argparse.Namespace, part: str) -> float:
    """Seconds that a part will take on two cores, infinite where nobody knows."""
    if options.repetitions or options.seconds:
        return math.inf
    if options.quick:
        return 10.0
    return EXPECTED[part] if options.thorough else BUDGET[part]


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
