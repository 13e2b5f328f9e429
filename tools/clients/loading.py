"""Imports single modules of a checkout, without the packages that are not installed.

A trainer's packages import everything that a run needs (Ray, vLLM, data loaders). Here a module is imported alone:
``__init__.py`` of the checkout's packages do not run, and packages that are not installed are replaced by stubs, whose
attributes are empty classes. A stub that is used, not just imported, gives an error or a wrong result at once, so only
packages that the checked modules do not use may be listed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class _Empty(type):
    """The class of empty classes, whose attributes are empty classes too."""

    def __getattr__(cls, name: str) -> Any:
        return _empty(cls, name)


class _Stub(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        return _empty(self, name)


def _empty(owner: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    made = _Empty(name, (), {"__init__": lambda self, *args, **options: None})
    setattr(owner, name, made)
    return made


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs for packages and modules that no finder before it has found."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parts = name.split(".")
        stubbed = any(".".join(parts[:n]) in self.packages for n in range(1, len(parts) + 1))
        return ModuleSpec(name, self, is_package=True) if stubbed else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


class _Bare(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of a checkout as empty packages, except some that run their ``__init__.py``."""

    def __init__(self, folder: Path, package: str, whole: Sequence[str]) -> None:
        self.folder, self.package, self.whole = folder, package, whole

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        found = self.folder.joinpath(*name.split("."))
        if name.split(".")[0] != self.package or not found.is_dir():
            return None
        if any(name == whole or name.startswith(f"{whole}.") for whole in self.whole):
            return None
        spec = ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(found)]
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(Path(module.__path__[0]) / "__init__.py")


def prepare(folder: Path, package: str, *, whole: Sequence[str] = (), optional: Iterable[str] = ()) -> list[str]:
    """Makes the modules of a checkout importable one by one, and returns what is a stub if it is imported.

    Args:
        folder: the checkout, which contains the package.
        package: the package of the trainer.
        whole: its packages whose ``__init__.py`` runs, with their subpackages.
        optional: packages, or modules of installed packages, to replace by stubs if they do not exist.
    """
    if not folder.joinpath(package).is_dir():
        raise SystemExit(f"{folder} must be a checkout that contains {package}/")
    missing = [name for name in optional if "." in name or importlib.util.find_spec(name) is None]
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, _Bare(folder, package, whole))
    sys.meta_path.append(_Stubs(missing))
    return missing
