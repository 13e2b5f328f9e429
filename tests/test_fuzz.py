"""A hundred random calls of the public operations; more in the exhaustive tests. See fuzz.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fuzz
import pytest
import torch
from fuzzing.memory import UNWRITTEN, guarded_library
from tiers import mostly_exhaustive

from star_kernels import TokenSelection, attention_maps, native


@pytest.mark.native
@pytest.mark.parametrize(("seed", "cases"), mostly_exhaustive([(0, 100), (1, 400)], [(0, 100)]))
@pytest.mark.parametrize("operation", fuzz.OPERATIONS)
def test_random_calls_agree_with_the_reference_and_write_only_their_outputs(
    operation: str, seed: int, cases: int, poisoned: None
) -> None:
    with guarded_library():
        for number in range(fuzz.cases_of(operation, cases)):
            fuzz.run_case(operation, seed, number)


@pytest.mark.native
@pytest.mark.parametrize(("harm", "message"), [("skip", "left unwritten"), ("overrun", "outside its elements")])
def test_a_kernel_that_writes_too_little_or_too_much_is_detected(
    harm: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library: Any = native.cpu()

    def harmful(*arguments: Any) -> None:
        library.attention_maps(*arguments)
        maps = arguments[-1]
        at, pattern = (0, UNWRITTEN[4][1]) if harm == "skip" else (maps.numel(), 0)
        maps.as_strided((1,), (1,), maps.storage_offset() + at).view(torch.int32).fill_(pattern)

    harmed = SimpleNamespace(**{**vars(library), "attention_maps": harmful})
    monkeypatch.setattr(native, "cpu", lambda: harmed)
    query = torch.randn(1, 1, 5, 8)
    with guarded_library(), pytest.raises(AssertionError, match=message):
        attention_maps(query, query, torch.zeros(1, 1, 5), TokenSelection.from_positions([[1]]))
