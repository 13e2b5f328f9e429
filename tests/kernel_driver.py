"""Builds tests/csrc/driver.cpp: the CPU kernels in a program without Python, with the compiler flags of setup.py."""

from __future__ import annotations

import runpy
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path(__file__).with_name("csrc")


@cache
def setup() -> dict[str, Any]:
    """The definitions in setup.py, without running the setup."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def compiler() -> list[str]:
    return shlex.split(setup()["compiler"]())


def version() -> str:
    """The name and the version of the compiler."""
    done = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def runs(*flags: str) -> bool:
    """Whether a program with these flags builds and runs; a sanitizer may be missing or fail to start."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        command = [*compiler(), *flags, "-x", "c++", "-", "-o", str(program)]
        made = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
        return made.returncode == 0 and subprocess.run([program], capture_output=True, check=False).returncode == 0


def build(folder: Path, flags: Sequence[str] = (), isa: str = "baseline", with_compiler: Sequence[str] = ()) -> Path:
    """Builds the program for one instruction set. ``flags`` follow all other flags and override them."""
    made, command = setup(), [*(with_compiler or compiler())]
    of_isa, lanes = made["INSTRUCTION_SETS"][isa]
    common = [*made["KERNEL"], *of_isa, "-fopenmp", f"-DSTAR_ISA={isa}", f"-DSTAR_LANES={lanes}", *flags]
    sources = {ROOT / "csrc/cpu" / f"{name}.cpp": contract for name, contract in made["CPU_KERNELS"].items()}
    sources |= {PROGRAM / "driver.cpp": "off", PROGRAM / "openmp.cpp": "off"}
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{source.stem}.o" for source in sources}

    def compile_one(source: Path) -> None:
        contract = f"-ffp-contract={sources[source]}"
        _run([*command, *common, contract, "-c", str(source), "-o", str(objects[source])])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))
    program = folder / "driver"
    # Linked without -fopenmp: openmp.cpp implements the functions of OpenMP that the kernels call.
    _run([*command, *flags, "-pthread", *map(str, objects.values()), "-o", str(program)])
    return program


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
