"""Reads YAML files of settings strictly: a repeated or unknown key is an error that names its line."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml
from yaml import YAMLError

from star_trainer.config import Config
from star_trainer.redact import redacted
from star_trainer.suggestion import suggestion as suggestion
from star_trainer.textfile import read_text

SECTIONS = {part: [f.name for f in fields(kind)] for part, kind in get_type_hints(Config).items()}
# Plain scalars of YAML 1.2. PyYAML implements 1.1, in which an unquoted "no" is False and 1e-4 is a string.
_PLAIN = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": ("<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    text = f"{redacted(key.value)!r} appears twice, in line {lines[key.value]} and in line {line}"
                    raise yaml.constructor.ConstructorError(problem=text, problem_mark=key.start_mark)
                lines[key.value] = line
        return super().construct_mapping(node, deep)


for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load(text: str) -> Any:
    """Parses a YAML text. Raises YAMLError if it is invalid or a key appears twice."""
    return yaml.load(text, _Loader)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a file, by section; an empty file has none.

    Raises:
        ValueError: invalid YAML, a repeated key or an unknown setting; the message names the file and the line.
        OSError: the file cannot be read.
    """
    try:
        loader = _Loader(read_text(Path(path)))
        root = loader.get_single_node()
        values = loader.construct_document(root) if root else None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from error
    except OSError as error:
        raise OSError(f"--config must be a readable YAML file, got {path}: {error.strerror}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must contain sections of settings ({', '.join(SECTIONS)}), got {redacted(values)!r}")
    for key, value in root.value:
        _check_known(path, key, [*SECTIONS, "preset"])
        section = key.value
        if section != "preset" and values[section] is not None:
            if not isinstance(value, yaml.MappingNode):
                where = f"{path}, line {key.start_mark.line + 1}"
                raise ValueError(f"{where}: {section} must be a section of settings, got {redacted(values[section])!r}")
            for name, _ in value.value:
                _check_known(path, name, SECTIONS[section], f"{section}.")
    return {section: value for section, value in values.items() if value is not None}


def _check_known(path: str | os.PathLike[str], key: Any, known: list[str], section: str = "") -> None:
    if key.value not in known:
        name = str(redacted(key.value))
        hint = suggestion(name, known)
        raise ValueError(f"{path}, line {key.start_mark.line + 1}: unknown setting {section}{name}{hint}")
