"""Reads text files of users: UTF-8, with or without a byte-order mark, with lines that end at newlines only."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file, without a byte-order mark at its start.

    Raises:
        ValueError: the file is not UTF-8; the message names the file and the line.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError(f"{path} is not UTF-8 text but looks like UTF-16 or UTF-32: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}, is not UTF-8 text: {error}") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    r"""The lines that are not blank, with their numbers from 1; whitespace around them is removed.

    Lines end at ``\n`` or ``\r\n``, not at other line separators of Unicode.

    Raises:
        ValueError: as :func:`read_text`, or a line contains a carriage return.
        OSError: the file cannot be read.
    """
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    # Concatenated files may contain several byte-order marks.
    stripped = [(number, line.removeprefix("\ufeff").strip()) for number, line in enumerate(lines, 1)]
    for number, line in stripped:
        if "\r" in line:
            raise ValueError(f"{path}, line {number}, contains a carriage return: lines must end with \\n or \\r\\n")
    return [(number, line) for number, line in stripped if line]
