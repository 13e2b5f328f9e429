"""The contents of the source distribution and of the wheel, and the tag of the wheel.

A stand-in for the compiler creates empty libraries, because only the packaging is tested.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = """#!/bin/sh
# A compiler that accepts any options and creates the file after -o.
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then : > "$2"; fi
    shift
done
"""


class Made(NamedTuple):
    files: list[str]  # tracked by git, or untracked and not ignored
    sdist: Path  # built from these files
    wheel: Path  # built from the sdist


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    pytest.importorskip("setuptools", minversion="77")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("requires a git checkout")
    files = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    folder = tmp_path_factory.mktemp("distribution")
    for name in files:
        target = folder / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    sdist = build("sdist", folder / "checkout", folder, {})
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    (source / "star_kernels/lib").mkdir()
    (source / "star_kernels/lib/libstar_kernels_cuda.so").touch()  # of an earlier build
    compiler = folder / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    wheel = build("wheel", source, folder, {"CXX": str(compiler), "STAR_KERNELS_CUDA": "0"})
    return Made(files, sdist, wheel)


def build(kind: str, source: Path, out: Path, environment: dict[str, str]) -> Path:
    """Calls the build backend as pip does."""
    kept = {name: value for name, value in os.environ.items() if name != "STAR_KERNELS_BUILD"}
    command = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=source,
        env={**kept, "STAR_KERNELS_REQUIRE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.mark.exhaustive
def test_the_wheel_is_tagged_for_every_python_of_a_platform(made: Made) -> None:
    with zipfile.ZipFile(made.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        tags = message_from_string(archive.read(name).decode()).get_all("Tag")
    assert tags
    assert all(tag.startswith("py3-none-") and not tag.endswith("-any") for tag in tags), tags
    assert made.wheel.name.split("-")[-3:-1] == ["py3", "none"]


@pytest.mark.exhaustive
def test_the_wheel_contains_the_library_the_tables_and_the_presets(made: Made) -> None:
    with zipfile.ZipFile(made.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    packages = [name.removeprefix("python/") for name in made.files if name.startswith(("star_kernels/", "python/"))]
    assert names == {*packages, "star_kernels/lib/libstar_kernels_cpu.so"}
    assert {"star_kernels/py.typed", "star_trainer/py.typed", "star_trainer/presets/small.yaml"} <= names


def test_the_sdist_contains_every_tracked_file(made: Made) -> None:
    with tarfile.open(made.sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in archive.getmembers() if m.isfile()}
    left_out = {name for name in set(made.files) - names if not name.startswith(".")}
    assert not left_out
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize(("cpu", "cuda"), [("yes", "yes"), ("yes", "no"), ("no", "yes")])
def test_the_test_of_a_wheel_fails_without_one_of_its_libraries(cpu: str, cuda: str, tmp_path: Path) -> None:
    (command,) = re.findall(r'^test-command = """(.*?)"""', (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.M)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'CPU library   {cpu}: ...'\necho 'CUDA library  {cuda}: ...'\n")
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "CUDA library" in done.stdout
    assert (done.returncode == 0) == (cpu == cuda == "yes")
