"""Fixtures for short runs of a tiny pipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from reward_server import Server

from star_trainer.config import Allocation, Config, Data, Evaluation, Model, Output, Reward, Rollout, Train
from star_trainer.trainer import Trainer


@pytest.fixture
def configure(pipeline_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """Returns a configuration of two groups of two samples with a reward without a model; keywords change settings."""

    def make(**parts: dict[str, Any]) -> Config:
        config = Config(
            model=Model(path=str(pipeline_folder), text_length=1),
            data=Data(prompts="scenes:text"),
            rollout=Rollout(steps=3, guidance=1.5, groups=2, group_size=2, batch=2),
            allocation=Allocation(),
            reward=Reward(weights={"jpeg-compressibility": 1.0}),
            train=Train(epochs=1, learning_rate=1e-2, ema_interval=1, updates=1),
            evaluation=Evaluation(every=0, prompts=2, steps=2),
            output=Output(folder=str(tmp_path / "run"), images_every=0, trackers=[]),
        )
        return replace(config, **{name: replace(getattr(config, name), **values) for name, values in parts.items()})

    return make


@pytest.fixture
def trainer_of() -> Callable[[Config], Trainer]:
    return lambda config: Trainer(config, Accelerator(cpu=True), progress=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    if server.hold:
        server.hold.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()
