"""Metrics and figures of a run: failures to write them do not end it, and figures are drawn at the set intervals."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from star_kernels import figures
from star_trainer import checkpoint, record
from star_trainer.config import Config
from star_trainer.policy import Text
from star_trainer.prompts import Prompt
from star_trainer.record import Record, read_metrics
from star_trainer.samples import Batch, Step
from star_trainer.trainer import Trainer


@pytest.fixture
def batch() -> Batch:
    latent, weights = torch.zeros(1, 4, 4, 4), torch.ones(1, 2, 2)
    text = Text(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    step = Step(0, latent, latent, torch.zeros(1, 4, 4), None, weights)
    return Batch([0], [Prompt("a clock")], text, [step], torch.zeros(1, 3, 8, 8))


def write_all(made: Record, batch: Batch, epoch: int) -> None:
    made.metrics("epoch", epoch, {"reward": 0.5})
    made.metrics("evaluation", epoch, {"reward": 0.5})
    made.samples(epoch, [torch.zeros(3, 8, 8)], ["a clock"], [0.5])
    made.allocation(epoch, batch, torch.tensor([0.5]))
    made.close()


def test_an_output_that_cannot_be_written_does_not_end_a_run(
    configure: Callable[..., Config], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Board:
        def add_scalar(self, *arguments: Any) -> None:
            raise OSError("the disk is full")

        close = add_scalar

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no image")

    made = Record(configure(output={"images_every": 1}), enabled=True)
    made.board = Board()
    for place, name in ((record, "grid"), (record, "curve"), (figures, "weights")):
        monkeypatch.setattr(place, name, fail)
    (made.folder / "metrics.jsonl").unlink()
    (made.folder / "metrics.jsonl").mkdir()
    with pytest.warns(RuntimeWarning) as caught:
        write_all(made, batch, 1)
    told = [str(warning.message).partition(" in ")[0] for warning in caught]
    assert told == ["metrics.jsonl", "the TensorBoard files", "reward.png", "sample grids", "allocation figures"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_all(made, batch, 2)


def test_a_blocked_tensorboard_writer_does_not_block_the_run(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the writer's thread has ended at an error, or is slow, its queue stays full."""
    told = threading.Event()
    made = Record(configure(output={"tensorboard": True}), enabled=True)
    monkeypatch.setattr(RecordWriter, "write", lambda *arguments: told.wait(60))
    many = {f"reward/{number}": 0.5 for number in range(100)}
    writing = threading.Thread(target=made.metrics, args=("epoch", 1, many), daemon=True)
    writing.start()
    writing.join(30)
    stuck = writing.is_alive()
    told.set()
    writing.join()
    made.close()
    assert not stuck


def test_figures_can_be_disabled(configure: Callable[..., Config], batch: Batch) -> None:
    for every, expected in ((0, []), (1, ["allocation-000002-0.png", "samples-000002.png"])):
        made = Record(configure(output={"images_every": every}), enabled=True)
        write_all(made, batch, 2)
        assert sorted(p.name for p in made.folder.glob("*-*.png")) == expected


def test_samples_are_shown_beside_those_of_the_first_evaluation(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Tensor], dict[str, Any]]] = []

    def grid(images: list[Tensor], titles: list[str], **options: Any) -> Figure:
        assert titles == ["a clock", "a sign"]
        drawn.append((images, options))
        return Figure()

    monkeypatch.setattr(record, "grid", grid)
    made = Record(configure(output={"images_every": 1}), enabled=True)
    made.samples(0, [torch.zeros(3, 8, 8)] * 2, ["a clock", "a sign"], [0.5, 0.3])
    made.samples(4, [torch.ones(3, 8, 8)] * 2, ["a clock", "a sign"], [1.0, 0.25])
    (alone, first), (pairs, second) = drawn
    assert alone[0].shape == (3, 8, 8)
    assert [note for note, _ in first["notes"]] == ["0.50", "0.30"]
    assert pairs[0].shape == (3, 8, 17)
    assert (pairs[0][:, :, :8].max(), pairs[0][:, :, 8:].min()) == (0, 1)  # the first is left, after it a white gap
    assert second["notes"] == [("0.50 \u2192 1.00", record.BETTER), ("0.30 \u2192 0.25", record.WORSE)]
    assert second["title"] == "epoch 0 (left) and epoch 4 (right), with rewards"


def test_figures_are_drawn_after_the_checkpoint(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def drawn(self: Record, epoch: int, *arguments: Any) -> None:
        seen.append((epoch, [path.name for path in checkpoint.find(self.folder)]))

    monkeypatch.setattr(Record, "allocation", drawn)
    monkeypatch.setattr(Record, "samples", drawn)
    trainer_of(configure(evaluation={"every": 1}, output={"images_every": 1})).run()
    assert seen == [(0, []), (1, ["checkpoint-000001"]), (1, ["checkpoint-000001"])]


def test_malformed_lines_of_metrics_are_left_out(configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure()
    folder = Path(config.output.folder)
    folder.mkdir()
    records = [{"event": "epoch", "epoch": n, "reward": 0.5} for n in (1, 2)]
    lines = ["", "7", "null", "[]", '{"epoch": 1}', '{"event": "epoch", "epoch": "1", "reward": 1}', '{"event": "ep']
    text = "\n".join([json.dumps(records[0]), *lines, json.dumps(records[1])])
    (folder / "metrics.jsonl").write_bytes(text.encode() + b"\n\xff\0\n")
    assert read_metrics(folder) == records
    Record(config, enabled=True, resumed_at=1)
    assert (folder / "metrics.jsonl").read_text() == json.dumps(records[0]) + "\n"
