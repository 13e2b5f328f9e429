"""The notebooks run from top to bottom with the small model, and are stored with the outputs of their code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import NOTEBOOKS

from tools import notebooks


@pytest.mark.exhaustive
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("star_trainer.policy.SHIPPED", small_model)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            lines = ("\n" if line.startswith("%") else line for line in cell["source"])
            exec(compile("".join(lines), f"{notebook.name}, cell {number}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_the_outputs_of_its_code(path: Path) -> None:
    notebook = json.loads(path.read_text())
    code = notebooks.code_cells(notebook)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    stored = notebook["metadata"]["star_kernels"]["code"]
    assert stored == notebooks.digest(notebook), f"run python -m tools.notebooks {path.stem}"


def test_running_a_notebook_stores_text_and_figures(tmp_path: Path) -> None:
    source = ["import matplotlib.pyplot as plt\n", "print('one')\n", "plt.figure(figsize=(1, 1))"]
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    notebooks.run(path)
    page = notebooks.markdown(path)
    assert "```console\none\n```" in page
    assert "](data:image/png;base64,iVBOR" in page


def test_at_most_ten_lines_change_flow_grpo_to_star() -> None:
    (notebook,) = [path for path in NOTEBOOKS if path.stem == "flow-grpo-to-star"]
    cells = json.loads(notebook.read_text())["cells"]
    marked = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"] if "# STAR" in line]
    assert 0 < len(marked) <= 10
