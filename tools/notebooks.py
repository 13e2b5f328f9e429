"""Runs the notebooks and stores their outputs in them: python -m tools.notebooks [NAME ...]

A notebook keeps the digest of the code that its outputs belong to, so that a test notices code without its outputs.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
DPI = 72


def run(path: Path) -> None:
    """Runs the cells of a notebook in order and writes their outputs into the file."""
    import matplotlib

    matplotlib.use("Agg")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(notebook), start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _execute(source(cell), f"{path.name}, cell {number}", names)
        cell["execution_count"] = number
        cell["outputs"] = list(_outputs(printed.getvalue(), value, number))
    notebook["metadata"]["star_kernels"] = {"code": digest(notebook)}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(notebook: dict[str, Any]) -> str:
    """The digest of the code of a notebook."""
    return hashlib.sha256("\0".join(source(cell) for cell in code_cells(notebook)).encode()).hexdigest()[:16]


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def markdown(path: Path) -> str:
    """A notebook as Markdown: its text, its code and its outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(source(cell))
            continue
        parts.append(f"```python\n{source(cell)}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```console\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                parts.append(f"![Output of the cell above](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts) + "\n"


def _execute(code: str, name: str, names: dict[str, Any]) -> Any:
    """Runs the code of a cell and returns the value of its last line if that is an expression."""
    lines = ["" if line.startswith("%") else line for line in code.split("\n")]
    tree = ast.parse("\n".join(lines), name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return eval(compile(ast.Expression(last.value), name, "eval"), names) if isinstance(last, ast.Expr) else None


def _outputs(printed: str, value: Any, number: int) -> Any:
    if printed:
        yield {"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}
    if hasattr(value, "savefig"):
        png = io.BytesIO()
        value.savefig(png, dpi=DPI, metadata={"Software": None})
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<Figure>"]}
        yield {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}


def main(arguments: list[str] | None = None) -> None:
    chosen = sys.argv[1:] if arguments is None else arguments
    unknown = set(chosen) - {path.stem for path in PATHS}
    if unknown or "--help" in chosen:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(path.stem for path in PATHS)}")
    for path in PATHS:
        if not chosen or path.stem in chosen:
            run(path)
            print(f"{path.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
