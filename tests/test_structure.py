"""The structure of the code: short files, short parameter lists, no import cycles, dependencies in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "star_kernels": ROOT / "star_kernels",
    "star_trainer": ROOT / "python" / "star_trainer",
    "benchmarks": ROOT / "benchmarks",
    "studies": ROOT / "studies",
    "tools": ROOT / "tools",
}
# What each package may import besides itself. Only these packages are imported across folders.
MAY_IMPORT = {
    "star_kernels": set(),
    "star_trainer": {"star_kernels"},
    "benchmarks": {"star_kernels", "star_trainer"},
    "studies": {"star_kernels", "star_trainer", "benchmarks"},
    "tools": {"star_kernels", "star_trainer", "benchmarks", "studies"},
}
MOST_LINES = 400
MOST_PARAMETERS = 12
CODE = {".py", ".h", ".cuh", ".cpp", ".cu"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(tree: ast.Module, *, inside_functions: bool) -> Iterator[str]:
    """Our modules that a module imports; without ``inside_functions`` only those imported with it."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


GRAPHS = {
    inside: {
        name: {m for m in imports(ast.parse(path.read_text()), inside_functions=inside) if m in MODULES and m != name}
        for name, path in MODULES.items()
    }
    for inside in (False, True)
}


def test_no_module_imports_itself_through_others() -> None:
    graph = GRAPHS[False]
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in finished:
            for other in graph[name]:
                visit(other, [*path, name])
            finished.add(name)

    for name in graph:
        visit(name, [])


def test_packages_depend_on_one_another_in_one_direction() -> None:
    for name, others in GRAPHS[True].items():
        package = name.split(".")[0]
        forbidden = {other for other in others if other.split(".")[0] not in MAY_IMPORT[package] | {package}}
        assert not forbidden, f"{name} must not import {sorted(forbidden)}"


@pytest.mark.parametrize("folder", [*FOLDERS.values(), ROOT / "csrc", ROOT / "tests"], ids=lambda folder: folder.name)
def test_files_are_short(folder: Path) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in folder.rglob("*") if path.suffix in CODE}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MOST_LINES} == {}


def test_functions_outside_kernels_take_few_positional_parameters() -> None:
    long = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                count = len(node.args.posonlyargs) + len(node.args.args)
                if count > MOST_PARAMETERS:
                    long.append(f"{name}.{node.name} takes {count}")
    assert long == []


@pytest.mark.parametrize("kernel", sorted((ROOT / "csrc").rglob("*.c*")), ids=lambda path: path.name)
def test_a_kernel_is_read_in_few_files(kernel: Path) -> None:
    own = [line for line in kernel.read_text().splitlines() if line.startswith('#include "')]
    assert len(own) <= 4
