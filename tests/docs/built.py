"""A page of the built site: its links and anchors, its lines of code and the widths of its tables.

Widths are for a window of 1400 pixels and the fonts of a browser on Linux, as measured in Chromium. Text wraps between
words, so the smallest width of a table is the sum over columns of the longest word.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

COLUMN = 866  # pixels of the text column
CODE_CHARACTERS = 101  # of a line in a block of code
TEXT_CHARACTERS = 126  # of a line in a block of plain text, which is smaller
CHARACTER, CODE_CHARACTER = 6.9, 6.6  # pixels, in a table
PADDING, CODE_PADDING = 20.5, 6.5


class Html(HTMLParser):
    """Reads a page.

    Attributes:
        links: targets within the site.
        code: language and text of each line of code.
        tables: heads of each table, and its smallest width in pixels.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.code: list[tuple[str, str]] = []
        self.tables: list[tuple[str, float]] = []
        self._block: str | None = None  # text of the block of code that is being read
        self._language = ""
        self._columns: list[float] = []
        self._heads, self._column, self._row = "", -1, False
        self._inline = 0
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = {key: value or "" for key, value in attributes}
        self.ids.update(known[key] for key in ("id", "name") if known.get(key))
        for key in ("href", "src"):
            if key in known and not known[key].startswith(("http", "data:", "mailto:", "javascript:")):
                self.links.append(known[key])
        if tag == "div" and "highlight" in known.get("class", ""):
            self._language = known["class"].split()[0].removeprefix("language-")
        elif tag == "pre":
            self._block = ""
        elif tag == "table":
            self._columns, self._heads = [], ""
        elif tag == "tr":
            self._column = -1
        elif tag in ("td", "th"):
            self._column, self._row = self._column + 1, True
            if self._column == len(self._columns):
                self._columns.append(0.0)
        elif tag == "code":
            self._inline += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre" and self._block is not None:
            self.code += [(self._language, line) for line in self._block.split("\n")]
            self._block = None
        elif tag == "table":
            self.tables.append((self._heads, sum(self._columns)))
        elif tag in ("td", "th"):
            self._row = False
        elif tag == "code":
            self._inline -= 1

    def handle_data(self, data: str) -> None:
        if self._block is not None:
            self._block += data
        elif self._row:
            self._heads = (self._heads + " " + data.strip())[:60]
            one, padding = (CODE_CHARACTER, CODE_PADDING) if self._inline else (CHARACTER, 0.0)
            words = data.replace("-", "- ").split()
            longest = max((len(word) for word in words), default=0)
            self._columns[self._column] = max(self._columns[self._column], PADDING + padding + one * longest)
