"""Signatures and constants of a source file, read without importing it, to compare with those that are written down."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Interface = Mapping[str, Mapping[str, Any]]  # file -> qualified name -> parameters, or a constant's value


class Finding(NamedTuple):
    """The outcome of one check."""

    name: str
    passed: bool
    figure: str = ""


def compare(folder: Path, interface: Interface) -> Iterator[Finding]:
    """A finding for each name of the interface: the file still has it, with the parameters or value written down."""
    for file, names in interface.items():
        for name, expected in names.items():
            try:
                found = read(folder / file, name)
            except (LookupError, OSError) as error:
                yield Finding(f"{file}: {name}", False, str(error))
                continue
            yield Finding(f"{file}: {name}", found == expected, "" if found == expected else f"is {found}")


def read(file: Path, name: str) -> Any:
    """The parameters of a function, or the value of a constant, by its qualified name.

    Parameters are strings: ``"x"``, ``"x="`` with a default, ``"*"`` before those that are passed by name.

    Raises:
        LookupError: the file has no such name.
    """
    node: ast.AST = _tree(file)
    for part in name.split("."):
        node = _member(node, part, name)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _parameters(node.args)
    return ast.literal_eval(node)


def parameters(function: Callable[..., Any]) -> list[str]:
    """The parameters of a function in the notation of :func:`read`."""
    found: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind == parameter.KEYWORD_ONLY and not any(entry.startswith("*") for entry in found):
            found.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        found.append(f"{star}{name}{'' if parameter.default is parameter.empty else '='}")
    return found


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _member(node: ast.AST, part: str, name: str) -> ast.AST:
    for child in getattr(node, "body", []):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == part:
            return child
        targets: Sequence[ast.expr] = child.targets if isinstance(child, ast.Assign) else ()
        if isinstance(child, ast.AnnAssign) and child.value is not None:
            targets = (child.target,)
        if any(isinstance(target, ast.Name) and target.id == part for target in targets):
            return child.value
    raise LookupError(f"there is no {name}")


def _parameters(arguments: ast.arguments) -> list[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    first = len(positional) - len(arguments.defaults)
    found = [argument.arg + ("=" if i >= first else "") for i, argument in enumerate(positional)]
    if arguments.vararg is not None:
        found.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        found.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [argument.arg + ("" if default is None else "=") for argument, default in pairs]
    return found + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg is not None else [])
