"""The notebooks run from top to bottom with the small model, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import NOTEBOOKS


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


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(notebook: Path) -> None:
    code = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_at_most_ten_lines_change_flow_grpo_to_star() -> None:
    (notebook,) = [path for path in NOTEBOOKS if path.stem == "flow-grpo-to-star"]
    cells = json.loads(notebook.read_text())["cells"]
    marked = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"] if "# STAR" in line]
    assert 0 < len(marked) <= 10
