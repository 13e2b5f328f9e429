"""The mean over blocks and heads when maps are kept per head, as on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import CASES

from star_kernels import TokenSelection
from star_kernels.capture import attention_call, averages, capture_maps
from star_kernels.capture.passes import ForwardPass


@torch.no_grad()
# All blocks alike, in a batch that is doubled or not; several resolutions and numbers of heads.
@pytest.mark.parametrize(("name", "doubled"), [("sd3.5", False), ("sd3.5", True), ("sdxl", False)])
def test_maps_kept_per_head_have_the_same_mean(name: str, doubled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model, inputs = case.make()
    expected = expected_maps(model, inputs, case, case.selection)
    if doubled:
        inputs = {key: torch.cat([value + 1, value]) for key, value in inputs.items()}
    monkeypatch.setattr(attention_call, "keeps_heads", lambda *_: True)
    with capture_maps(model, case.selection, cfg="last" if doubled else None) as maps:
        model(**inputs)
    assert all(captured.maps.ndim == 4 for captured in maps._modules)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


def test_every_block_counts_equally_whatever_its_heads_and_resolution() -> None:
    found = [torch.full((1, 1, 2, 16), 1.0), torch.full((1, 1, 4, 16), 4.0), torch.full((1, 1, 4, 4), 7.0)]
    grids = {16: (4, 4), 4: (2, 2)}
    for blocks in (found, [maps.mean(dim=2) for maps in found]):
        mean = averages.mean_maps(blocks, grids.__getitem__)
        torch.testing.assert_close(mean, torch.full((1, 1, 4, 4), 4.0))


def keeps(query: Any, **changes: Any) -> bool:
    selection = TokenSelection.from_positions([[1], [2]])
    given = {"selection": selection, "expected": "", "rows": (0, 1024), "grad_enabled": False, "detached": 24}
    return averages.keeps_heads(ForwardPass(**{**given, **changes}), query)


def test_heads_are_kept_for_detached_maps_on_a_gpu_that_use_little_memory() -> None:
    query = SimpleNamespace(is_cuda=True, shape=(2, 24, 1357, 64))
    assert keeps(query)
    assert not keeps(SimpleNamespace(is_cuda=False, shape=query.shape))
    assert not keeps(query, detached=0)
    per_block = 4 * 2 * 24 * 1024
    most = averages.HEADS_BYTES // per_block
    assert keeps(query, detached=most)
    assert not keeps(query, detached=most + 1)
    assert not keeps(query, detached=most, rows=None)  # of all 1357 queries
    four = TokenSelection.from_positions([[[1], [2], [3], [4]]] * 2)
    assert not keeps(query, detached=most // 4 + 1, selection=four)


def test_a_capture_tells_attention_how_many_blocks_have_detached_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3.5"]
    for detach in (True, False):
        model, inputs = case.make()
        counts = []
        monkeypatch.setattr(attention_call, "keeps_heads", lambda p, _, c=counts: bool(c.append(p.detached)))
        with capture_maps(model, case.selection, cfg=None, detach=detach) as maps:
            model(**inputs)
        count = len(maps._modules)
        assert counts == [count if detach else 0] * count
