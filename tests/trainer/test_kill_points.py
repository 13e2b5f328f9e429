"""A run that is killed at any point loses at most the current epoch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from star_trainer.config import Config

POINTS = 5


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_resumes_with_the_same_result(configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure(train={"epochs": 2, "updates": 2}, output={"checkpoint_every": 1, "keep": 1})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    script = Path(__file__).with_name("kill_points.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(tmp_path), str(POINTS)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{POINTS} points of " in done.stdout
