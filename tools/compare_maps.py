"""Measures packages that make attention maps, and reads trainers, for the comparison in README.

``python -m tools.compare_maps --attention-map-diffusers DIR --daam DIR --flow-grpo DIR --verl-omni DIR`` takes
checkouts; nothing of them is part of this project. Each package makes the maps of a pass of the same small models with
random weights, in float32, in a process of its own with one thread on a CPU, by its own public entry point. The time is
processor time, the least of --rounds passes with maps over the least of as many without, in turn. ``--python`` is the
interpreter for the other packages, which require older versions than this one. Trainers are not run: what they do is
read in their sources, and the command stops if these have changed.

Without checkouts only this package is measured. ``--out FILE`` writes the results as JSON after each package, and keeps
what the file has of packages that are not measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("star-kernels", "attention-map-diffusers", "daam")
TRAINERS = ("flow-grpo", "verl-omni")
ERROR_LINES = 3


def module_of(package: str) -> Any:
    return importlib.import_module(f"tools.compared.{package.replace('-', '_')}")


def measured(package: str, checkout: str, rounds: int, *, tiny: bool = False) -> dict[str, Any]:
    """The measurements of a package in this process, or the error with which it failed."""
    from tools.compared.measure import measure

    module = module_of(package)
    row: dict[str, Any] = {"versions": {name: version(name) for name in module.PACKAGES}, "kept": module.KEPT}
    start = time.process_time()
    row["models"] = {name: measure(module, checkout, name, rounds, tiny=tiny) for name in module.MODELS}
    return {**row, "processor_seconds": round(time.process_time() - start, 1)}


def in_a_process(python: str, package: str, checkout: str, rounds: int) -> dict[str, Any]:
    """The measurements of a package in a process of its own; if it fails, the end of what it printed as ``error``."""
    command = [python, "-m", "tools.compare_maps", "--only", package, "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    arguments = [f"--{package}", checkout] if checkout else []
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-ERROR_LINES:]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def commit(checkout: Path) -> str:
    """The commit of a checkout, or "unknown"."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def text(package: str, row: dict[str, Any]) -> str:
    """A line for each model of a package."""
    if "error" in row:
        return f"{package}: FAILED\n  " + "\n  ".join(row["error"])
    lines = [f"{package} ({', '.join(f'{k} {v}' for k, v in row['versions'].items())})"]
    for name, found in row["models"].items():
        same = "the same output" if found["output_identical"] else f"output differs by {found['output_difference']:.0e}"
        peak, kept = found["peak_bytes_added"] / 2**20, found["bytes_kept"] / 2**20
        lines.append(
            f"  {name}: {found['time_over_plain']:.2f} times a pass without maps, {peak:.0f} MiB more at the peak, "
            f"{kept:.2f} MiB kept, {same}, "
            f"{'' if found['differentiable'] else 'not '}differentiable"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_maps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in (*PACKAGES[1:], *TRAINERS):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"a checkout of {name}")
    parser.add_argument("--python", default=sys.executable, help="runs the other packages (default: this interpreter)")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each kind (default: 3)")
    parser.add_argument("--others", action="store_true", help="do not measure this package")
    parser.add_argument("--out", type=Path, help="the results as JSON (default: none are written)")
    parser.add_argument("--only", choices=PACKAGES, help="measure one package in this process and print JSON")
    given = vars(parser.parse_args(arguments))
    if given["rounds"] < 1:
        parser.error(f"--rounds must be at least 1, got {given['rounds']}")
    folders = {n: given[n.replace("-", "_")] for n in (*PACKAGES[1:], *TRAINERS)}
    folders = {name: folder.resolve() for name, folder in folders.items() if folder is not None}
    for name, folder in folders.items():
        if not folder.is_dir():
            parser.error(f"--{name} must be a folder, got {folder}")
    if only := given["only"]:
        if only not in folders and only != PACKAGES[0]:
            parser.error(f"--only {only} requires --{only} DIR")
        print(json.dumps(measured(only, str(folders.get(only, "")), given["rounds"])))
        return 0
    out: Path | None = given["out"]
    result: dict[str, Any] = {"packages": {}, "trainers": {}}
    if out is not None and out.exists():
        result = json.loads(out.read_text(encoding="utf-8"))
    failed = False
    for package in PACKAGES:
        if package in folders or (package == PACKAGES[0] and not given["others"]):
            python = sys.executable if package == PACKAGES[0] else given["python"]
            row = in_a_process(python, package, str(folders.get(package, "")), given["rounds"])
            folder = folders.get(package, ROOT)
            row = {"commit": commit(folder), "processor": processor(), **row}
            result["packages"][package] = row
            failed |= "error" in row
            print(text(package, row), flush=True)
            write(out, result)
    from tools.compared import trainers

    for name in TRAINERS:
        if name in folders:
            result["trainers"][name] = {"commit": commit(folders[name]), **trainers.read(name, folders[name])}
            maps = result["trainers"][name]["files_with_maps"]
            print(f"{name}: {result['trainers'][name]['credit']}; files with maps: {', '.join(maps) or 'none'}")
    write(out, result)
    return int(failed)


def write(out: Path | None, result: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
