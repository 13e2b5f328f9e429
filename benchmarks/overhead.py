"""What attention maps and spatial weights cost: python benchmarks/overhead.py

On a GPU if there is one and else on the CPU: attention with maps against attention without and against other ways to
get maps; on a GPU its backward pass against PyTorch's; the weighted policy loss against Flow-GRPO's arithmetic in
PyTorch; a transformer's forward pass with and without capture; a whole rollout-and-update step with and without STAR;
and so an epoch of the driver, with its rewards. Prints tables, and writes JSON and a plot to benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is chatty

import attention_backward
import attention_overhead
import environment
import plot
import policy_overhead
import report
import torch
from harness import Budget
from thresholds import evaluate

PARTS = ("attention", "backward", "policy", "capture", "end-to-end", "epoch")
# Of each comparison, after its checks.
SECONDS = {"attention": 36.0, "backward": 12.0, "policy": 12.0, "capture": 40.0, "end-to-end": 75.0, "epoch": 90.0}
RECORDED = ("only", "device", "dtype", "repetitions", "seconds", "batch", "quick")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    dtypes = [DTYPES[name] for name in options.dtype] if options.dtype else None
    parts: dict[str, list[dict[str, Any]]] = {}
    started = time.perf_counter()
    runs = _runs(options, device, dtypes)
    for part in options.only or PARTS:
        parts[part] = runs[part]()
    described = environment.describe(device)
    outcomes = evaluate(parts, device.type)
    result = {
        "environment": described,
        "settings": {
            **{name: getattr(options, name) for name in RECORDED},
            "prompts": f"{options.prompts.name if options.prompts else 'built in'} ({len(options.texts)})",
            "tokenizer": options.tokenizer.name if options.tokenizer else "BPE trained on the prompts",
        },
        "seconds": round(time.perf_counter() - started, 1),
        "parts": parts,
        "thresholds": [outcome.as_dict() for outcome in outcomes],
    }
    name = f"overhead-{environment.slug(described)}"
    print(report.text(result, outcomes))
    report.write_json(options.out / f"{name}.json", result)
    plot.draw(options.out / f"{name}.png", result)
    print(f"\n{result['seconds']:.0f} s; wrote {os.path.relpath(options.out / name)}.json and .png")
    if options.check and not outcomes:
        print("--check: no threshold is about what was run", file=sys.stderr)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if options.check and failed:
        print(f"\n{len(failed)} of {len(outcomes)} thresholds not held:", *failed, sep="\n  ", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part alone (may be repeated)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; each part has its default")
    parser.add_argument("--repetitions", type=_positive, help="rounds of each comparison, instead of a time limit")
    parser.add_argument("--seconds", type=_positive, help="time of each comparison, instead of each part's own")
    parser.add_argument("--batch", type=_positive, help="batch size, instead of each part's own")
    parser.add_argument("--prompts", type=Path, help='prompts, one a line, or JSON lines with a "prompt" each')
    parser.add_argument("--tokenizer", type=Path, help="folder of a fast tokenizer (default: trained on the prompts)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON and plot")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a threshold is not held")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: shows that everything runs")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device: this torch cannot use {options.device!r} here")
    from prompt_tokens import PromptError, load_tokenizer, read_prompts

    try:  # before anything is timed
        options.texts = read_prompts(options.prompts)
        options.loaded_tokenizer = load_tokenizer(options.tokenizer, options.texts)
    except PromptError as error:
        parser.error(str(error))
    return options


def _runs(
    options: argparse.Namespace, device: torch.device, dtypes: list[torch.dtype] | None
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    def budget(part: str) -> Budget:
        if options.repetitions:
            return Budget(options.repetitions, float("inf"))
        return Budget(3, 1.0) if options.quick else Budget(1000, options.seconds or SECONDS[part])

    def end_to_end() -> list[dict[str, Any]]:
        from end_to_end import measure

        return measure(*common("end-to-end"), prompts=options.texts, tokenizer=options.loaded_tokenizer)

    def capture() -> list[dict[str, Any]]:
        from capture_overhead import measure

        return measure(*common("capture"))

    def epoch() -> list[dict[str, Any]]:
        from epoch_overhead import measure

        return measure(*common("epoch"))

    def common(part: str) -> tuple[Any, ...]:
        return device, dtypes, options.batch, budget(part), options.quick

    return {
        "attention": lambda: attention_overhead.measure(*common("attention")),
        "backward": lambda: attention_backward.measure(*common("backward")),
        "policy": lambda: policy_overhead.measure(*common("policy")),
        "capture": capture,
        "end-to-end": end_to_end,
        "epoch": epoch,
    }


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
