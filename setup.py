"""Compiles csrc/ into plain shared libraries that star_kernels.native loads.

All other settings of the package are in pyproject.toml. The libraries depend neither on torch nor on Python: they are
built with ninja and the headers of apache-tvm-ffi, in pip's isolated build environment, and work with every torch
version.

Environment:
    CXX                      the C++17 compiler (default c++)
    STAR_KERNELS_CUDA        "0" skips the CUDA library even if nvcc is found
    STAR_KERNELS_CUDA_ARCHS  CUDA architectures, such as "90a" or "80 90a 100a" (default: those of 80, 90a and 100a
                             that nvcc supports)
    STAR_KERNELS_REQUIRE     "1" makes it an error if a library cannot be compiled; otherwise the installation continues
                             with a warning, and the operations fall back to PyTorch
    STAR_KERNELS_BUILD       a folder that keeps what was compiled, so that later builds compile only what changed; also
                             has the PTX of the CUDA kernels and ptxas's report (default: a temporary folder)
    STAR_KERNELS_MACHINE     a processor to build for on another one, such as aarch64; CXX must be a cross-compiler for
                             it. The CUDA library is then skipped, and the tag of a wheel is linux_aarch64
    MAX_JOBS                 number of parallel compiler processes (default: that of ninja)
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
WARNINGS = ["-Wall", "-Wextra"]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{SOURCES}"]
# The order of sums is preserved; these options only drop errno and floating-point traps.
KERNEL = [*COMMON, *WARNINGS, "-O3", "-fno-math-errno", "-fno-trapping-math"]
INSTRUCTION_SETS = {  # name -> compiler flags, number of floats in a vector register
    "baseline": ([], 4),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], 8),
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"], 16),
}
# file -> value of -ffp-contract, see csrc/flow_policy.h
CPU_KERNELS = {
    "allocation": "off",
    "attention_maps": "fast",
    "attention_statistics": "fast",
    "flow_policy": "off",
    "nft": "fast",
}
CUDA_KERNELS = ("policy_forward", "policy_backward", "policy_fused", "nft", "sample_transition")
HOPPER_KERNELS = ("attention_forward", "attention_variants")  # empty on every other architecture
CUDA_ARCHITECTURES = ("80", "90a", "100a")


class Missing(Exception):
    """A tool that is required to build a library is missing."""


class BuildNative(build_ext):
    """Builds each library with ninja and copies it to star_kernels/lib."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        if self.inplace:  # setuptools does not create the folder
            (ROOT / "star_kernels" / "lib").mkdir(exist_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        work = Path(os.environ.get("STAR_KERNELS_BUILD") or self.build_temp).resolve() / target.stem
        try:
            if target.stem == "libstar_kernels_cuda":
                run_ninja(work, cuda_rules(work if os.environ.get("STAR_KERNELS_BUILD") else None))
            else:
                run_ninja(work, cpu_rules())
        except (Missing, subprocess.CalledProcessError) as reason:
            detail = (reason.stdout or "") if isinstance(reason, subprocess.CalledProcessError) else ""
            message = f"{target.name} is not built: {reason}\n{detail}"
            if os.environ.get("STAR_KERNELS_REQUIRE") == "1":
                raise SystemExit(message) from reason
            print(f"warning: {message}The installation continues; operations fall back to PyTorch.", file=sys.stderr)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # processes that have loaded the old library keep it
        shutil.copyfile(work / "library.so", target)


class PlatformWheel(bdist_wheel):
    """A wheel whose tag has only the platform: the libraries do not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", f"linux_{machine()}" if crossing() else super().get_tag()[2]


def machine() -> str:
    """The processor to build for."""
    return os.environ.get("STAR_KERNELS_MACHINE") or platform.machine()


def crossing() -> bool:
    return machine() != platform.machine()


def compiler() -> str:
    command = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(command)[0]) is None:
        raise Missing(f"no C++17 compiler: {command!r} is not on PATH; set CXX to a compiler")
    if crossing():
        ask = [*shlex.split(command), "-dumpmachine"]
        target = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        if not target.startswith(machine()):
            raise SystemExit(f"STAR_KERNELS_MACHINE is {machine()}, but CXX={command!r} compiles for {target}")
    return command


def tvm_ffi_flags() -> tuple[list[str], list[str]]:
    """The compiler flags and the linker flags for apache-tvm-ffi."""
    from tvm_ffi import libinfo

    library = Path(libinfo.find_libtvm_ffi()).parent
    includes = {libinfo.find_include_path(), libinfo.find_dlpack_include_path()}
    return [flag for path in sorted(includes) for flag in ("-isystem", path)], [f"-L{library}", "-ltvm_ffi"]


def cpu_rules() -> str:
    """ninja rules for the CPU library: each kernel for each instruction set, and the exports that select one.

    The symbols of OpenMP stay undefined. They resolve to the runtime that torch has loaded, so that both use the same
    threads.
    """
    cxx = compiler()
    x86 = machine() in ("x86_64", "AMD64")
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    include, link = tvm_ffi_flags()
    exports = [*COMMON, *WARNINGS, *include, "-O1", *(["-DSTAR_X86"] if x86 else [])]
    edges = [edge("exports.o", SOURCES / "cpu" / "exports.cpp", exports)]
    for isa in INSTRUCTION_SETS if x86 else ("baseline",):
        flags, lanes = INSTRUCTION_SETS[isa]
        for name, contract in CPU_KERNELS.items():
            kernel = [
                *KERNEL,
                *openmp,
                *flags,
                f"-ffp-contract={contract}",
                f"-DSTAR_ISA={isa}",
                f"-DSTAR_LANES={lanes}",
            ]
            edges.append(edge(f"{name}.{isa}.o", SOURCES / "cpu" / f"{name}.cpp", kernel))
    if crossing():  # the installed libtvm_ffi.so is for this machine: link with an empty library of its name
        edges, link = [*edges, "build libtvm_ffi.so: stub"], ["-Wl,--no-as-needed", "-L.", "-ltvm_ffi"]
    return rules(cxx, edges, ["-shared", *link, "-Wl,-z,now"] if sys.platform == "linux" else ["-shared", *link])


def cuda_rules(keep: Path | None = None) -> str:
    """ninja rules for the CUDA library, which has the code of every architecture.

    With a folder, each kernel keeps its PTX in the subfolder of its name, and ptxas's report in its .o.txt.
    """
    nvcc = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    wanted = os.environ.get("STAR_KERNELS_CUDA_ARCHS")
    if wanted:
        architectures = re.split(r"[\s,;]+", wanted.strip())
    else:
        architectures = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch.rstrip('a')}" in known.split()]
    if not architectures:
        raise Missing(f"{nvcc} supports none of the architectures {', '.join(CUDA_ARCHITECTURES)}")
    include, link = tvm_ffi_flags()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    # PTX for devices newer than the list; architectures such as 90a have no portable PTX.
    codes += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in architectures if arch.isdigit()][:1]
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
    hopper = [code for code in codes if "90a" in code] or codes
    kernel = ["-std=c++17", "-O3", "--threads=0", host, f"-I{SOURCES}"]
    names = f'-DSTAR_CUDA_ARCHITECTURES="{" ".join(f"sm_{arch}" for arch in architectures)}"'
    exports = ["-std=c++17", "-O1", host, f"-I{SOURCES}", *include, names]
    edges = [edge(f"{name}.o", SOURCES / "cuda" / f"{name}.cpp", exports) for name in ("exports", "attention_exports")]
    for name in (*CUDA_KERNELS, *HOPPER_KERNELS):
        flags = [*kernel, *(codes if name in CUDA_KERNELS else hopper)]
        if keep:
            (keep / name).mkdir(parents=True, exist_ok=True)
            flags += ["-Xptxas=-v", "--keep", f"--keep-dir={keep / name}"]
        edges.append(edge(f"{name}.o", SOURCES / "cuda" / f"{name}.cu", flags))
    return rules(nvcc, edges, ["-shared", "--cudart=static", *link], depfile="-MD -MF")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise Missing("nvcc is not on PATH; set CUDA_HOME to the CUDA toolkit")
    return nvcc


def edge(output: str, source: Path, flags: list[str]) -> str:
    return f"build {output}: compile {escape(source)}\n  flags = {shlex.join(flags)}"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def rules(cxx: str, edges: list[str], link: list[str], depfile: str = "-MMD -MF") -> str:
    objects = " ".join(line.split(":")[0].removeprefix("build ") for line in edges)
    return "\n".join(
        [
            f"rule compile\n  command = {cxx} {depfile} $out.d $flags -c $in -o $out > $out.txt 2>&1; "
            "status=$$?; cat $out.txt; exit $$status\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {cxx} $in {shlex.join(link)} -o $out",
            f"rule stub\n  command = {cxx} -shared -Wl,-soname,$out -x c++ /dev/null -o $out",
            *edges,
            f"build library.so: link {objects}\n",
        ]
    )


def run_ninja(work: Path, rules: str, *targets: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(rules)
    try:
        import ninja

        command = [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        command = ["ninja"]
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run(
        [*command, *jobs, *(targets or ["library.so"])],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    done.check_returncode()


def libraries() -> list[Extension]:
    names = ["libstar_kernels_cpu"]
    if os.environ.get("STAR_KERNELS_CUDA") != "0" and not crossing():
        try:
            find_nvcc()
            names.append("libstar_kernels_cuda")
        except Missing as reason:  # no CUDA compiler: the CUDA library is skipped unless a toolkit is named
            home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
            if home and os.environ.get("STAR_KERNELS_REQUIRE") == "1":
                raise SystemExit(f"libstar_kernels_cuda.so is not built: no nvcc in {home}/bin") from reason
    return [Extension(f"star_kernels.lib.{name}", sources=[], optional=True) for name in names]


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
