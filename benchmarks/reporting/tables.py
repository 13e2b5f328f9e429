"""The figures as aligned text and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH = 100


def beginning(environment: dict[str, Any], thorough: bool) -> str:
    """What is measured on, and how to read the tables that follow."""
    isa = environment["libraries"]["cpu"] or "not built"
    versions = f"torch {environment['versions']['torch']} · C++ library: {isa}"
    lines = [
        f"{environment['device_name']} · {environment['threads']} threads · {versions}",
        "Times are medians with the 20th and 80th percentile.",
    ]
    if thorough:
        lines += [
            "Ratios are medians of ratios within a round, with the 20th and 80th percentile and, in brackets, the 95 %",
            "interval of the median.",
        ]
    return "\n".join(lines)


def case_text(part: str, case: dict[str, Any], thorough: bool) -> str:
    """The table of a case; a thorough run's with all ratios and notes."""
    more = [*_ratios(case), *_notes(case)] if thorough else []
    return "\n".join(["", f"{part.upper()}  {case['title']}"[:WIDTH], *_times(case), *more])


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")  # an interruption leaves the old file or the new one, not half of one
    new.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def markdown_table(title: str, heads: Sequence[str], rows: dict[str, list[str]]) -> str:
    """A Markdown table with ``title`` above its first column."""
    lines = [" | ".join(["", title, *heads, ""]).strip(), "|---" * (1 + len(heads)) + "|"]
    lines += [" | ".join(["", name, *cells, ""]).strip() for name, cells in rows.items()]
    return "\n".join(lines)


def _times(case: dict[str, Any]) -> list[str]:
    with_error = any(row.get("map_error") for row in case["times"].values())
    reference = case["times"][case["reference"]]["label"].split(",")[0]
    error = "map error" if with_error else ""
    lines = [f"  {'':<41}{'median ms':>10}{'20th':>10}{'80th':>10}{'relative':>10}{error:>11}{'n':>5}"]
    for name, row in case["times"].items():
        milliseconds = "".join(f"{_significant(1e3 * row[key]):>10}" for key in ("median", "p20", "p80"))
        error = f"{row['map_error']:.0e}" if row.get("map_error") else ""
        relative = f"{case['relative'][name]['median']:.3f}"
        lines.append(f"  {row['label']:<41}{milliseconds}{relative:>10}{error:>11}{row['count']:>5}")
    about = "; map error: relative RMS against the definition in float32" if with_error else ""
    return [*lines, f"  (relative: to '{reference}'{about})"]


def _ratios(case: dict[str, Any]) -> list[str]:
    lines = []
    for row in case["ratios"].values():
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
        spread = f"{row['p20']:.3f} - {row['p80']:.3f}" if "p20" in row else ""
        lines.append(f"  {row['label']:<55} {row['median']:>7.3f}{spread:>17}  {interval}".rstrip())
    return lines


def _notes(case: dict[str, Any]) -> list[str]:
    return [
        line
        for note in case["notes"]
        for line in textwrap.wrap(note, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")
    ]


def _significant(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds >= 100 else f"{milliseconds:.3f}"
