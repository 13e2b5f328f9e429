"""A small pipeline for the examples of the pages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "integrations"))  # small_pipelines


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Runs each test with one thread, which is fastest for small models."""
    threads(1)


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The folder of the small Stable Diffusion 3 in the package."""
    pytest.importorskip("diffusers")
    from star_trainer.policy import SHIPPED

    return SHIPPED


@pytest.fixture
def small_pipeline(small_model: Path) -> Any:
    import torch

    from star_trainer.policy import load_pipeline

    return load_pipeline(str(small_model), torch.float32)
