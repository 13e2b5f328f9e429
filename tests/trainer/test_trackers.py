"""Trackers receive metrics and images; none of them ends a run. The hub receives the weights and their model card."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import HfApi, constants

from star_trainer import limits, objectives
from star_trainer.config import Config
from star_trainer.hub import model_card
from star_trainer.policy import Text
from star_trainer.prompts import Prompt
from star_trainer.record import Record
from star_trainer.samples import Batch, Step
from star_trainer.trainer import Trainer

SERVICE = """
calls = []
class Config(dict):
    def update(self, values, **options): calls.append(("config", values))
config = Config()
class Image:
    def __init__(self, pixels): self.shape = pixels.shape
class Run:
    def log(self, values, step=None): calls.append(("log", values, step))
    def finish(self): calls.append(("finish",))
def init(**options):
    calls.append(("init", options))
    return Run()
"""
MLFLOW = """
import types
calls = []
utils = types.SimpleNamespace(validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=9))
set_tracking_uri = lambda uri: calls.append(("uri", uri))
search_experiments = lambda **options: []
create_experiment = lambda **options: calls.append(("init", options))
start_run = lambda **options: None
log_params = lambda values: calls.append(("config", values))
log_metrics = lambda values, step: calls.append(("log", values, step))
log_artifact = lambda local_path, artifact_path: calls.append(("image", local_path))
end_run = lambda: calls.append(("finish",))
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[Any]]]:
    """Installs stand-ins of the packages; returns a function of a package's calls."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, text in (("wandb", SERVICE), ("swanlab", SERVICE), ("mlflow", MLFLOW)):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setitem(sys.modules, name, None)  # restores a package that is installed
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))  # no logins
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "SWANLAB_SAVE_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    Accelerator(cpu=True)  # accelerate's trackers log through its state
    yield lambda name: __import__(name).calls
    for name in ("wandb", "swanlab", "mlflow"):
        sys.modules.pop(name, None)


def written(config: Config) -> Path:
    """Writes one epoch of everything; returns the run's folder."""
    latent, text = torch.zeros(1, 4, 4, 4), Text(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    step = Step(0, latent, latent, torch.zeros(1, 4, 4), None, torch.ones(1, 2, 2))
    batch = Batch([0], [Prompt("a clock")], text, [step], torch.zeros(1, 3, 8, 8))
    made = Record(config, enabled=True)
    made.metrics("epoch", 1, {"reward": 0.5, "reward/scene": 0.5})
    made.samples(1, [torch.zeros(3, 8, 8)], ["a clock"], [0.5])
    made.allocation(1, batch, torch.tensor([0.5]))
    made.close()
    return made.folder


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_tracker_receives_metrics_and_images_offline_without_a_login(
    configure: Callable[..., Config], services: Callable[[str], list[Any]], name: str
) -> None:
    secret = {"weights": {"scene": 1.0}, "options": {"scene": {"api_key": "abc-secret"}}}
    folder = written(configure(reward=secret, output={"trackers": [name], "images_every": 1}))
    calls = services(name)
    kinds = [call[0] for call in calls]
    init = calls[kinds.index("init")][1]
    if name == "mlflow":
        assert calls[0] == ("uri", f"sqlite:///{folder / 'mlflow.db'}")
        images = [Path(path).name for kind, path in (call for call in calls if call[0] == "image")]
        assert images == ["samples-000001.png", "allocation-000001-0.png"]
    else:
        assert init["mode"] == "offline"
        shapes = {
            key: value[0].shape
            for call in calls
            if call[0] == "log"
            for key, value in call[1].items()
            if type(value) is list
        }
        assert set(shapes) == {"samples", "allocation/0"}
        assert all(len(shape) == 3 and shape[2] == 3 for shape in shapes.values())
    assert ("log", {"epoch/reward": 0.5, "epoch/reward/scene": 0.5}, 1) in calls
    told = {key: value for call in calls if call[0] == "config" for key, value in call[1].items()}
    assert told["train.objective"] == "flow_grpo"
    assert json.loads(told["reward.options"]) == {"scene": {"api_key": "***"}}
    assert kinds[-1] == "finish"


def test_a_login_is_used(
    configure: Callable[..., Config],
    services: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("SWANLAB_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    written(configure(output={"trackers": ["wandb", "swanlab", "mlflow"]}))
    assert "mode" not in services("wandb")[0][1]
    assert "mode" not in services("swanlab")[0][1]
    assert services("mlflow")[0] == ("init", {"name": "star-train", "artifact_location": None, "tags": None})


def test_a_tracker_that_fails_warns_once_and_leaves_the_others(
    configure: Callable[..., Config], services: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import swanlab
    import wandb

    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(wandb.Run, "log", fail)
    monkeypatch.setattr(swanlab, "init", fail)
    with pytest.warns(RuntimeWarning) as caught:
        written(configure(output={"trackers": ["wandb", "swanlab", "mlflow"], "images_every": 1}))
    told = [str(warning.message).partition(" in ")[0] for warning in caught]
    assert told == ["the records of swanlab", "the records of wandb"]
    assert [call[0] for call in services("mlflow")].count("image") == 2


def test_a_missing_package_is_an_error_before_the_model_is_loaded(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "find_spec", lambda name: None)
    config = configure(output={"trackers": ["swanlab"]}, model={"path": "./absent"})
    with pytest.raises(ValueError, match=r"output\.trackers swanlab must be installed: pip install swanlab"):
        limits.check(config, 1)


def test_tensorboard_receives_images(configure: Callable[..., Config]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = written(configure(output={"trackers": ["tensorboard"], "images_every": 1}))
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["images"]) == {"samples", "allocation/0"}
    assert set(found.Tags()["scalars"]) == {"epoch/reward", "epoch/reward/scene"}


def test_the_hub_receives_the_weights_and_their_card(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(("upload", options)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    config = configure(
        evaluation={"every": 1},
        output={"push_to_hub": "someone/trained"},
    )
    trainer_of(config).run()
    final = Path(config.output.folder).absolute() / "final"
    assert calls == [
        ("someone/trained", {"private": True, "exist_ok": True}),
        ("upload", {"folder_path": final, "repo_id": "someone/trained"}),
    ]
    card = (final / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["star-kernels", "flow_grpo"]
    assert "| 0 |" in card
    assert "| 1 |" in card
    assert (final / "reward.png").is_file()
    assert str(Path(config.model.path).parent) not in card
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"output\.push_to_hub requires a login"):
        limits.check(config, 1)


def test_an_upload_that_fails_is_a_warning(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    config = configure(output={"push_to_hub": "someone/trained"})
    made = Record(config, enabled=True)
    final = made.folder / "final"
    final.mkdir()
    with pytest.warns(RuntimeWarning, match="the repository someone/trained with the weights .* cannot be written"):
        made.publish(final, 1)
    assert "has no evaluations" in (final / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Record(config, enabled=True).publish(final, 0)  # a run that was stopped before its last epoch uploads nothing


def test_the_card_of_adapters_names_their_base(configure: Callable[..., Config]) -> None:
    config = configure(model={"path": "owner/base", "lora_rank": 4}, train={"objective": "nft"})
    lines = [
        {"event": "evaluation", "epoch": n, "reward": 0.1 * n, "reward/ocr": 0.2, "reward/clipscore": 0.3}
        for n in (0, 1, 2)
    ]
    card = model_card(config, 2, lines)
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["tags"]) == ("owner/base", ["star-kernels", "nft", "lora"])
    assert "| epoch | reward | reward/ocr | reward/clipscore |" in card
    assert "| 2 | 0.2000 | 0.2000 | 0.3000 |" in card
    assert "| 1 |" not in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["train"]["objective"] == "nft"
