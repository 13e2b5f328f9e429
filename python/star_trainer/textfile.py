"""Text files of the user: UTF-8, with or without a byte-order mark, in lines that end at newlines alone."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file, without a byte-order mark at its start.

    Raises:
        ValueError: it is not UTF-8; the message names the file and the line.
        OSError: it cannot be read.
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
    r"""The lines that are not blank, without the space around them, and their numbers from 1.

    Lines end at ``\n`` or ``\r\n`` and at nothing else that Unicode knows as the end of a line.

    Raises:
        ValueError: as :func:`read_text`, or a carriage return within a line.
        OSError: it cannot be read.
    """
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    # Files joined one after another bring the mark of each.
    stripped = [(number, line.removeprefix("\ufeff").strip()) for number, line in enumerate(lines, 1)]
    for number, line in stripped:
        if "\r" in line:
            raise ValueError(f"{path}, line {number}, holds a carriage return: lines must end with \\n or \\r\\n")
    return [(number, line) for number, line in stripped if line]
