"""Builds a wheel from a source distribution, installs it into an empty environment, and uses it outside the repository.

``python -m tools.check_wheel SDIST_OR_WHEEL`` checks the contents and the metadata of the wheel, installs it with the
pinned versions of its dependencies, and runs ``python -m star_kernels`` and the blocks of the quickstart in an empty
folder, without a compiler on PATH. A source distribution is built into a wheel first, without the CUDA library. Extras
are not installed; ``star-train`` must then name the one that it needs.

A wheel for another processor is not installed. Its libraries must be for the processor of its tag, and the CPU library
is loaded in an emulator, with apache-tvm-ffi's library of that processor, if there are qemu-user and a cross-compiler.
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
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"star_kernels", "star_trainer"}
LIBRARY = "star_kernels/lib/libstar_kernels_cpu.so"
FILES = {
    "star_kernels/py.typed",
    "star_trainer/py.typed",
    LIBRARY,
    "star_trainer/presets/small.yaml",
}
# The processor of a tag -> e_machine in the header of an ELF file.
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
# Loads libraries in order: the last one must find all of its symbols in those before it.
LOADER = r"""
#include <dlfcn.h>
#include <cstdio>
int main(int count, char **paths) {
  for (int i = 1; i < count; ++i)
    if (!dlopen(paths[i], RTLD_NOW | RTLD_GLOBAL)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
}
"""
# The kernels are loaded, and no operation falls back to PyTorch with a warning.
PRELUDE = """import warnings
warnings.simplefilter("error", RuntimeWarning)
from star_kernels import native
assert native.cpu() is not None"""


def first_use() -> str:
    """The blocks of the quickstart up to those that require a model: attention, weights, a step and the loss."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").partition("## With a model")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return "\n".join([PRELUDE, *(block for block in blocks if "load_pipeline" not in block)])


def problems(wheel: Path) -> list[str]:
    """What is wrong with the contents and the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        entries = archive.read(f"{folder}/entry_points.txt").decode()
    found = [f"{name} is missing" for name in sorted({*FILES, f"{folder}/licenses/LICENSE"} - names)]
    unwanted = {name.split("/")[0] for name in names} - {*PACKAGES, folder}
    found += [f"{name} is in the wheel" for name in sorted(unwanted)]
    found += [f"{name} is in the wheel" for name in sorted(names) if name.endswith((".pyc", ".cpp", ".cu", ".o"))]
    found += [f"the command {name} is missing" for name in ("star-train", "star-train-small") if name not in entries]
    return found + library_problems(wheel) + metadata_problems(metadata)


def processor(wheel: Path) -> str:
    """The processor in the tag of a wheel, such as aarch64 in py3-none-linux_aarch64.

    Raises:
        ValueError: the wheel is for all processors or for an unknown one.
    """
    tag = wheel.stem.rpartition("-")[2]
    for name in ELF_MACHINES:
        if tag.endswith(f"_{name}"):
            return name
    raise ValueError(f"the tag of {wheel.name} must end with one of the processors {', '.join(ELF_MACHINES)}")


def library_problems(wheel: Path) -> list[str]:
    """The libraries that are not for the processor of the tag."""
    expected, found = processor(wheel), []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            start = archive.open(name).read(20)
            if name.endswith(".so") or start.startswith(b"\x7fELF"):
                machine = int.from_bytes(start[18:20], "little")
                if machine != ELF_MACHINES[expected]:
                    known = {value: key for key, value in ELF_MACHINES.items()}
                    is_for = known.get(machine, "an unknown processor")
                    found.append(f"{name} is for {is_for}, the tag for {expected}")
    return found


def metadata_problems(metadata: Message) -> list[str]:
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    found = []
    if metadata["License-Expression"] != "Apache-2.0":
        found.append(f"the licence is {metadata['License-Expression']!r}, not 'Apache-2.0'")
    if not any(line.startswith("torch") for line in required):
        found.append(f"torch is not among the requirements {required}")
    if "text/markdown" not in (metadata["Description-Content-Type"] or ""):
        found.append("the description is not Markdown")
    return found


def build(sdist: Path, folder: Path) -> Path:
    """Builds a wheel in pip's isolated environment."""
    environment = {**os.environ, "STAR_KERNELS_CUDA": "0", "STAR_KERNELS_REQUIRE": "1"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(sdist)]
    subprocess.run(command, env=environment, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def use(wheel: Path, folder: Path) -> None:
    """Installs a wheel into an empty environment, and runs the first commands of the guide in an empty folder."""
    venv.create(folder / "environment", with_pip=True)
    python, empty = folder / "environment" / "bin" / "python", folder / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "STAR_"))}
    constraints = str(ROOT / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-c", constraints, str(wheel)], env=environment, check=True)
    environment["PATH"] = "/nowhere"
    for arguments in (["-m", "star_kernels"], ["-c", first_use()]):
        subprocess.run([python, *arguments], cwd=empty, env=environment, check=True)
    command = [python.with_name("star-train"), "--train.epochs", "1"]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr)
    if done.returncode == 0 or "pip install 'star-kernels[train]'" not in done.stderr or "Traceback" in done.stderr:
        raise SystemExit("star-train does not name the extra that it requires")


def load_in_emulator(wheel: Path, folder: Path) -> str:
    """Loads the CPU library of a wheel for another processor, and returns what was done or why it was not.

    Raises:
        CalledProcessError: the library does not load.
    """
    target = processor(wheel)
    compiler, emulator, root = f"{target}-linux-gnu-g++", f"qemu-{target}", Path(f"/usr/{target}-linux-gnu")
    if missing := [name for name in (compiler, emulator) if shutil.which(name) is None]:
        return f"the library was not loaded: requires {' and '.join(missing)}"
    # apache-tvm-ffi has no wheel for all versions of Python, and this one is not run.
    options = ["--no-deps", "--only-binary=:all:", f"--platform=manylinux_2_28_{target}", "--python-version=3.11"]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), "apache-tvm-ffi"]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt")], check=True)
    for path in (wheel, *folder.glob("apache_tvm_ffi-*.whl")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    program = folder / "loader"
    build = [compiler, "-x", "c++", "-", "-o", str(program), "-ldl"]
    subprocess.run(build, input=LOADER, text=True, check=True)
    libraries = [root / "lib" / "libgomp.so.1", folder / "tvm_ffi/lib/libtvm_ffi.so", folder / LIBRARY]
    subprocess.run([emulator, "-L", str(root), program, *libraries], check=True)
    return f"the CPU library for {target} loads in {emulator}, with apache-tvm-ffi's library and OpenMP"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distribution", type=Path, metavar="SDIST_OR_WHEEL")
    given = parser.parse_args(arguments).distribution.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = given if given.suffix == ".whl" else build(given, folder)
        found = problems(wheel)
        print("\n".join(found) or f"the contents and the metadata of {wheel.name} are as they must be")
        if processor(wheel) == platform.machine():
            use(wheel, folder)
        else:
            print(f"{wheel.name} is not for this machine and is not installed; {load_in_emulator(wheel, folder)}")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
