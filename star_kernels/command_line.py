"""The parser of the commands: an unknown option is an error that suggests the most similar one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class Parser(argparse.ArgumentParser):
    """Prints the description as it is written, and accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        self._known: list[str] = []
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self._known += action.option_strings
        return action

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        # Before anything else: argparse first reports that the option is missing whose name was misspelt.
        for argument in given:
            name = argument.partition("=")[0]
            if argument == "--":
                break
            if name.startswith("--") and name not in self._known:
                found = get_close_matches(name, self._known, n=1)
                hint = f"; did you mean {found[0]}?" if found else ""
                self.error(f"unrecognized arguments: {name}{hint}")
        return super().parse_args(given, namespace)
