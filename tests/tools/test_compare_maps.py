"""tools.compare_maps: what it measures of this package, what it reads of trainers, and the file of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import compare_maps
from tools.compared import models, trainers


def test_this_package_is_measured_on_models_of_both_kinds() -> None:
    pytest.importorskip("diffusers")
    threads = torch.get_num_threads()
    row = compare_maps.measured("star-kernels", "", 1, tiny=True)
    assert torch.get_num_threads() == threads
    assert set(row["models"]) == set(models.MODELS)
    for found in row["models"].values():
        assert found["output_difference"] <= 1e-6
        assert found["differentiable"]
        assert found["time_over_plain"] > 0
        assert found["bytes_kept"] == 4 * 2 * found["first_map"][-1] * found["first_map"][-2]


def trainer(folder: Path) -> Path:
    for file, text in trainers.TRAINERS["flow-grpo"].statements:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_trainer_that_has_changed_is_an_error(tmp_path: Path) -> None:
    found = trainers.read("flow-grpo", trainer(tmp_path))
    assert (found["files"], found["files_with_maps"]) == (1, [])
    (tmp_path / "flow_grpo/maps.py").write_text("attn_maps = 1")
    assert trainers.read("flow-grpo", tmp_path)["files_with_maps"] == ["flow_grpo/maps.py"]
    (tmp_path / "scripts/train_sd3.py").write_text("")
    with pytest.raises(
        SystemExit, match=r"flow-grpo: scripts/train_sd3.py does not contain .*; read the trainer again"
    ):
        trainers.read("flow-grpo", tmp_path)


def test_rows_that_are_not_measured_stay_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(python: str, package: str, checkout: str, rounds: int) -> dict[str, Any]:
        return {"error": [f"{package} does not import"]}

    monkeypatch.setattr(compare_maps, "in_a_process", failing)
    out = tmp_path / "results.json"
    out.write_text('{"packages": {"daam": 1}, "trainers": {}}')
    assert compare_maps.main(["--out", str(out)]) == 1
    assert "star-kernels: FAILED\n  star-kernels does not import" in capsys.readouterr().out
    packages = json.loads(out.read_text())["packages"]
    assert packages["daam"] == 1
    assert packages["star-kernels"]["error"] == ["star-kernels does not import"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--daam", "absent"], "--daam must be a folder, got"),
        (["--only", "daam"], "--only daam requires --daam DIR"),
    ],
)
def test_invalid_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare_maps.main(arguments)
    assert message in capsys.readouterr().err
