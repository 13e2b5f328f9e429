"""A plain function as a reward."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from star_trainer.rewards import Reward, build

IMAGES = torch.rand(3, 3, 4, 4)
METADATA = [{"level": 1.0}, {"level": 2.0}, {"level": 3.0}]


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def scaled(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, float]], scale: float = 1.0
) -> Tensor:
    return scale * torch.tensor([each["level"] for each in metadata])


class Nameless:
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def plain() -> Iterator[types.ModuleType]:
    module = types.ModuleType("plain")
    module.brightness, module.scaled, module.Nameless = brightness, scaled, Nameless
    sys.modules["plain"] = module
    yield module
    del sys.modules["plain"]


def test_a_function_of_images_and_prompts_is_a_reward() -> None:
    total = build({"plain:brightness": 2.0})
    assert isinstance(total.rewards["brightness"], Reward)
    scores = total.scores(IMAGES, [""] * 3, METADATA)
    assert torch.equal(scores.total, 2 * IMAGES.mean((1, 2, 3)))


def test_a_function_gets_the_metadata_and_its_options() -> None:
    scores = build({"plain:scaled": 1.0}, options={"plain:scaled": {"scale": 10.0}}).scores(IMAGES, [""] * 3, METADATA)
    assert scores.total.tolist() == [10.0, 20.0, 30.0]


def test_options_that_a_function_does_not_accept_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"reward 'brightness' must be a function .* its options \{'colour': 1\}"):
        build({"plain:brightness": 1.0}, options={"plain:brightness": {"colour": 1}})


def test_a_missing_module_names_the_folder_that_was_searched() -> None:
    with pytest.raises(ImportError, match=r"reward 'absent_module:score' cannot be imported: .*current directory"):
        build({"absent_module:score": 1.0})


def test_the_command_finds_modules_of_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "nearby.py").write_text("class Nameless:\n    def __call__(self, *arguments):\n        return None\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    weights = '{"nearby:Nameless": 1.0}'
    program = "import sys; sys.path.remove(''); from star_trainer.command import entry; entry()"
    command = [sys.executable, "-c", program, "--reward.weights", weights, "--output.folder", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("'nearby:Nameless' must return a reward (a callable with a name), got Nameless\n")
