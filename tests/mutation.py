"""Mutation tests: changes each constant and operator of the reference implementations in turn and runs the tests.

    python tests/mutation.py [--only policy allocation attention kernels] [--lines TEXT] [--list]

The changes are made in a copy of the repository in a temporary folder. Mutants that no test detects are printed.
EQUIVALENT lists mutants that cannot have an effect, with the reason. The exit status is 1 if another mutant survives,
or if an entry of EQUIVALENT matches no line. A run takes about ten minutes.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds; a mutant may cause an infinite loop
TARGETS = {  # name -> file, test files, expression that selects tests
    "policy": (
        "star_kernels/policy/naive.py",
        [
            *("test_nft_loss", "test_sampling", "test_policy_options", "test_policy_extremes", "test_policy_loss"),
            *("test_policy_credit", "test_policy_dense", "test_policy_gradients", "test_policy_phrases"),
        ],
        "naive or reference or rounding",
    ),
    "allocation": ("star_kernels/allocation.py", ["test_allocation", "test_allocation_kernel"], ""),
    "attention": (
        "star_kernels/attention/naive.py",
        [
            "test_maps",
            "test_attention",
            "test_attention_extremes",
            "test_attention_gradients",
            "test_attention_layouts",
        ],
        "naive or reference",
    ),
    "kernels": (
        "csrc/flow_policy.h",
        [
            *("test_sampling", "test_policy_options", "test_policy_extremes", "test_policy_loss"),
            *("test_policy_credit", "test_policy_dense", "test_policy_gradients", "test_policy_phrases"),
        ],
        "native",
    ),
}
FOLDERS = {"policy": "tests/policy", "allocation": "tests", "attention": "tests/attention", "kernels": "tests/policy"}
# (file, line, change) -> why no test can detect it. If a file has the same change of the same line more than once, the
# change ends with the number of the occurrence: "* -> / #2".
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "star_kernels/allocation.py",
        "fits = (left * ordered <= cap * rest) & (left > 0) & (rest > 0)",
        "<= -> <",
    ): "a weight equal to the cap is at the cap in both cases",
    (
        "star_kernels/allocation.py",
        "fits = (left * ordered <= cap * rest) & (left > 0) & (rest > 0)",
        "> -> >=",
    ): "if nothing remains for position k, the cap remains for the position before it, which fits",
    (
        "star_kernels/attention/naive.py",
        "scores = torch.matmul(_wide(query), _wide(key).transpose(-1, -2)) * arguments.scale",
        "- ->  #2",
    ): "of four dimensions -2 is 2",
    (
        "star_kernels/attention/naive.py",
        "scores = torch.matmul(dense, _wide(gathered.gather(2, positions)).transpose(-1, -2)) * arguments.scale",
        "- ->  #2",
    ): "of four dimensions -2 is 2",
    (
        "star_kernels/attention/naive.py",
        "normaliser = lse.gather(2, positions[..., 0])[:, :, None]",
        "0 -> 1",
    ): "positions are expanded along the last dimension; tests/fuzz.py draws heads of one element",
    (
        "star_kernels/policy/naive.py",
        "log_ratio = log_ratio - (a.old_log_prob if a.mask is None else a.old_log_prob.masked_fill(~a.mask, 0.0))",
        "0.0 -> 1.0",
    ): "values at masked locations are discarded; they only must not be NaN",
    (
        "star_kernels/policy/naive.py",
        "bounds = outside & ((bounded > free) | idle)",
        "> -> >=",
    ): "equal only if the advantage, and therefore the gradient, is zero",
    (
        "star_kernels/policy/naive.py",
        "return torch.where(bounds, bounded.detach(), -advantage * torch.exp(log_ratio.masked_fill(bounds, 0.0)))",
        "0.0 -> 1.0",
    ): "any finite number works, because the other branch is selected",
    (
        "star_kernels/policy/naive.py",
        "return latent if a.mask is None else latent.masked_fill(~a.mask.unsqueeze(a.channel_dim), 0.0)",
        "0.0 -> 1.0",
    ): "values at masked locations are discarded; they only must not be NaN",
    (
        "csrc/flow_policy.h",
        "return {p[kMeanSample * columns], p[kMeanOutput * columns], p[kStd * columns],",
        "* -> /",
    ): "the operand is kMeanSample, which is 0",
    (
        "csrc/flow_policy.h",
        "const float clipped = ratio < low ? low : (ratio > high ? high : ratio);",
        "< -> <=",
    ): "a ratio at the bound is the bound",
    (
        "csrc/flow_policy.h",
        "const float clipped = ratio < low ? low : (ratio > high ? high : ratio);",
        "> -> >=",
    ): "a ratio at the bound is the bound",
    (
        "csrc/flow_policy.h",
        "const bool acts = inside || free_loss > clipped_loss;",
        "> -> >=",
    ): "equal outside the range only if the advantage, and therefore the slope, is zero",
    (
        "csrc/flow_policy.h",
        "const float loss = free_loss >= clipped_loss || free_loss != free_loss ? free_loss : clipped_loss;",
        ">= -> >",
    ): "both numbers are equal",
}

_SWAPS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*"}
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Pow: "**"}
_COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
_COMPARISON_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


@dataclass(frozen=True)
class Mutant:
    file: str
    start: int  # the characters from start to stop are replaced by text
    stop: int
    text: str
    source: str

    @property
    def line(self) -> str:
        """The changed line without its comment."""
        begin = self.source.rfind("\n", 0, self.start) + 1
        comment = "  #" if self.file.endswith(".py") else "  //"
        return self.source[begin : self.source.index("\n", self.start)].partition(comment)[0].strip()

    @property
    def change(self) -> str:
        return f"{self.source[self.start : self.stop]} -> {self.text}"

    @property
    def number(self) -> int:
        return self.source.count("\n", 0, self.start) + 1

    @property
    def mutated(self) -> str:
        return self.source[: self.start] + self.text + self.source[self.stop :]


def python_mutants(file: str, source: str) -> Iterator[Mutant]:
    """Mutants of constants, arithmetic operators, comparisons and signs in Python code."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()
    assert len(data) == len(source), "the file must be ASCII, so that offsets in bytes are offsets in characters"

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column

    def span(node: ast.expr) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)

    def sign_between(left: ast.expr, right: ast.expr, sign: str) -> tuple[int, int]:
        start = span(left)[1]
        found = source.index(sign, start, span(right)[0])
        return found, found + len(sign)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield Mutant(file, *span(node), repr(node.value + 1), source)
            if isinstance(node.value, float) and node.value:
                yield Mutant(file, *span(node), "0.0", source)
        elif isinstance(node, ast.BinOp) and type(node.op) in _SWAPS:
            where = sign_between(node.left, node.right, _SIGNS[type(node.op)])
            yield Mutant(file, *where, _SWAPS[type(node.op)], source)
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS and len(node.ops) == 1:
            where = sign_between(node.left, node.comparators[0], _COMPARISON_SIGNS[type(node.ops[0])])
            yield Mutant(file, *where, _COMPARISONS[type(node.ops[0])], source)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            start = span(node)[0]
            yield Mutant(file, start, start + 1, "", source)


def header_mutants(file: str, source: str) -> Iterator[Mutant]:
    """Mutants of constants, operators and comparisons in the C++ code that runs on a CPU."""
    body = re.sub(r"//.*|#if defined\(__CUDA_ARCH__\)\n.*\n#else", lambda m: " " * len(m[0]), source)
    body = re.sub(r"#.*", lambda m: " " * len(m[0]), body)
    swaps = {
        "+": "-",
        "-": "+",
        "*": "/",
        "/": "*",
        "<": "<=",
        ">": ">=",
        ">=": ">",
        "==": "!=",
        "!=": "==",
        "||": "&&",
    }
    for found in re.finditer(r"(?<![\w.])(\d+\.\d+f)|(?<= )([-+*/<>]|>=|==|!=|\|\|)(?= )|(?<=[ (])-(?=[a-z])", body):
        text = found[0]
        if found[1]:
            value = float(text[:-1])
            for changed in (value + 1, 0.0 if value else -1.0):
                yield Mutant(file, *found.span(), f"{changed}f", source)
        elif found[2]:
            yield Mutant(file, *found.span(), swaps[text], source)
        else:
            yield Mutant(file, *found.span(), "", source)
    for call, other in (("multiply(", "add("), ("add(", "multiply(")):
        for found in re.finditer(rf"(?<!float ){re.escape(call)}", body):
            yield Mutant(file, *found.span(), other, source)


def named(name: str, source: str) -> dict[tuple[str, str, str], Mutant]:
    """The mutants of a target in the order of the source, by their keys in EQUIVALENT."""
    file = TARGETS[name][0]
    made = header_mutants if name == "kernels" else python_mutants
    found: dict[tuple[str, str, str], Mutant] = {}
    count: Counter[tuple[str, str]] = Counter()
    for mutant in sorted(made(file, source), key=lambda m: (m.start, m.text)):
        count[mutant.line, mutant.change] += 1
        number = count[mutant.line, mutant.change]
        found[file, mutant.line, mutant.change + (f" #{number}" if number > 1 else "")] = mutant
    return found


def stale() -> list[tuple[str, str, str]]:
    """The entries of EQUIVALENT that match no mutant of the current code."""
    existing = {key for name, (file, *_) in TARGETS.items() for key in named(name, (ROOT / file).read_text())}
    return [key for key in EQUIVALENT if key not in existing]


def copy_tree(folder: Path) -> Path:
    """Copies the files that the tests require."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "results", ".*", "*cuda.so")
    for name in ("star_kernels", "tests", "csrc", "benchmarks", "studies", "tools", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copyfile(ROOT / name, tree / name)
    return tree


def preload() -> None:
    """Imports the packages that every run requires. Runs are forks of this process."""
    for name in ("hypothesis", "pytest", "torch.profiler"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def detected(tree: Path, name: str) -> bool:
    """Whether a test detects the mutant. The test files run one after the other until one fails."""
    _, tests, expression = TARGETS[name]
    return any(fails(tree, f"{FOLDERS[name]}/{test}.py", expression) for test in tests)


def fails(tree: Path, test: str, expression: str) -> bool:
    """Whether a test of the file fails. The tests run in a fork of this process with ``tree`` as working directory."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = run_tests(tree, test, expression)
        finally:
            os._exit(status)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


def run_tests(tree: Path, test: str, expression: str) -> int:
    import pytest

    os.chdir(tree)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.path[:0] = [str(tree)]
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-p", "no:cacheprovider", test]
    return int(pytest.main([*options, "-k", expression] if expression else options))


def build_kernels(tree: Path) -> bool:
    """Builds the CPU library for the baseline instruction set. Returns whether the build succeeds."""
    work, library = tree / "build", tree / "star_kernels/lib/libstar_kernels_cpu.so"
    code = (
        "import platform, runpy; from pathlib import Path; from unittest import mock\n"
        "platform.machine = lambda: 'plain'\n"
        "with mock.patch('setuptools.setup'): made = runpy.run_path('setup.py')\n"
        f"made['run_ninja'](Path({str(work)!r}), made['cpu_rules']().replace('-O3', '-O1'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        library.unlink(missing_ok=True)
        shutil.copyfile(work / "library.so", library)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutation.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="targets (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--lines", default="", metavar="TEXT", help="change only lines that contain this text")
    options = parser.parse_args()
    for file, line, change in stale():
        print(f"EQUIVALENT has an entry that matches no mutant: {file}: {change}: {line}")
    unexplained = len(stale())
    if not options.list:
        preload()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = copy_tree(Path(folder))
        for name in options.only:
            file = TARGETS[name][0]
            source = (tree / file).read_text()
            mutants = {key: mutant for key, mutant in named(name, source).items() if options.lines in mutant.line}
            if options.list:
                print(*(f"{file}:{m.number}: {key[2]}: {m.line}" for key, m in mutants.items()), sep="\n")
                continue
            if name == "kernels":
                assert build_kernels(tree), "the kernels do not build"
            assert not detected(tree, name), f"the tests of {name} fail without a mutant"
            began, survivors = time.monotonic(), []
            for key, mutant in mutants.items():
                (tree / file).write_text(mutant.mutated)
                if (name == "kernels" and not build_kernels(tree)) or detected(tree, name):
                    continue
                survivors.append(mutant)
                reason = EQUIVALENT.get(key)
                unexplained += reason is None
                print(
                    f"{file}:{mutant.number}: {key[2]}: {mutant.line}\n    {reason or 'NO TEST DETECTS IT'}",
                    flush=True,
                )
            (tree / file).write_text(source)
            seconds = time.monotonic() - began
            print(f"{name}: {len(mutants)} mutants, {len(survivors)} survive, {seconds:.0f} s", flush=True)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
