"""The stand-ins for VeRL-Omni have the signatures and keys that are written down for the real code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import verl_omni_contract as contract

from tools.clients.interface import Finding, compare, parameters, read
from tools.clients.verl_omni_interface import ALGORITHMS, ENGINES, INTERFACE


def stand_in(name: str) -> Any:
    found: Any = contract.make_engines() if name.split(".")[0].endswith("Engine") else vars(contract)
    found = found[name.split(".")[0]]
    return getattr(found, name.split(".")[1])


NAMES = [name for file in (ALGORITHMS, ENGINES) for name in INTERFACE[file] if "." in name]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DiffusionLossFn.__call__"])
def test_stand_ins_have_the_real_signatures_and_keys(name: str) -> None:
    expected = (INTERFACE[ALGORITHMS] | INTERFACE[ENGINES])[name]  # type: ignore[operator]
    found = stand_in(name)
    if callable(found):
        bound = expected[:1] if expected[0] == "cls" else []
        assert [*bound, *parameters(found)] == expected
    else:
        assert found == expected


SOURCE = """
KEYS: tuple = ("a", "b")

class Loss:
    names = ("x",)

    def call(self, a, /, b=1, *, config, data=None, **rest): ...
    def varying(self, *values, last): ...
"""


def test_signatures_are_read_from_sources(tmp_path: Path) -> None:
    file = tmp_path / "losses.py"
    file.write_text(SOURCE)
    assert read(file, "KEYS") == ("a", "b")
    assert read(file, "Loss.names") == ("x",)
    assert read(file, "Loss.call") == ["self", "a", "b=", "*", "config", "data=", "**rest"]
    assert read(file, "Loss.varying") == ["self", "*values", "last"]
    with pytest.raises(LookupError, match=r"there is no Loss\.gone"):
        read(file, "Loss.gone")

    def call(self, a, /, b=1, *, config, data=None, **rest): ...  # type: ignore[no-untyped-def]

    assert parameters(call) == read(file, "Loss.call")


def test_drift_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text(SOURCE)
    expected = {
        "losses.py": {"KEYS": ("a",), "Loss.call": ["self"], "Loss.names": ("x",), "gone": []},
        "no.py": {"x": 1},
    }
    findings = {finding.name: finding for finding in compare(tmp_path, expected)}
    assert findings["losses.py: KEYS"] == Finding("losses.py: KEYS", False, "is ('a', 'b')")
    assert [finding.passed for finding in findings.values()] == [False, False, True, False, False]
