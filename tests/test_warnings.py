"""A warning shows the line of the caller, not one of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_inputs import SELECTION, TRANSITION, inputs
from torch._subclasses import FakeTensorMode

from star_kernels import attention, attention_maps, native, sample_transition, weighted_nft_loss, weighted_policy_loss
from star_kernels.policy import backends

t = inputs()
CALLS: dict[str, Callable[[], object]] = {
    "attention": lambda: attention(t["query"], t["key"], t["value"], SELECTION),
    "attention with gradients": lambda: attention(t["query"].requires_grad_(), t["key"], t["value"], SELECTION),
    "attention_maps": lambda: attention_maps(t["query"], t["key"], t["lse"], SELECTION),
    "weighted_policy_loss": lambda: weighted_policy_loss(
        *(t[n] for n in ("model_output", "sample", "prev_sample", "old_log_prob", "advantages")), TRANSITION
    ),
    "weighted_nft_loss": lambda: weighted_nft_loss(
        *(t[n] for n in ("model_output", "sample", "prev_sample", "advantages", "sigma"))
    ),
    "sample_transition": lambda: sample_transition(t["model_output"], t["sample"], TRANSITION),
    "an operator": lambda: torch.ops.star_kernels.attention(
        t["query"], t["key"], t["value"], SELECTION.index, SELECTION.weight, None, 0, 5, 0.3, True, "vendor"
    ),
}


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    caches = (native.load, native.cpu, native.cuda, backends._triton_problem, backends._warn_naive)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("name", CALLS)
def test_the_missing_library_is_told_at_the_callers_line(name: str, nothing_compiled: None) -> None:
    with pytest.warns(UserWarning, match="star_kernels runs on PyTorch alone") as caught:
        CALLS[name]()
    assert [warning.filename for warning in caught] == [__file__]


def test_a_gpu_without_kernels_is_told_at_the_callers_line(nothing_compiled: None) -> None:
    with FakeTensorMode():
        latent, numbers = torch.empty(2, 4, 3, 4, device="cuda"), torch.empty(2, device="cuda")
        with pytest.warns(UserWarning, match="policy loss falls back to plain PyTorch") as caught:
            weighted_nft_loss(latent, latent, latent, numbers, numbers)
    assert [warning.filename for warning in caught] == [__file__]


def test_attention_by_its_definition_is_told_at_the_callers_line() -> None:
    query = torch.empty(2, 2, 5, 7, device="meta")
    with pytest.warns(UserWarning, match="materialises all probabilities") as caught:
        attention(query, query, query, SELECTION.to("meta"))
    assert [warning.filename for warning in caught] == [__file__]
