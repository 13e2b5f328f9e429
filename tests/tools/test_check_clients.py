"""tools.check_clients prints every finding and fails with one; single modules of a checkout are imported alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tools import check_clients
from tools.clients.interface import Finding
from tools.clients.loading import prepare


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A trainer with a check that passes and one that fails; returns the folders that it was called with."""
    called: list[Path] = []

    def check(folder: Path) -> Iterator[Finding]:
        called.append(folder)
        yield Finding("the same loss", True, "1e-7")
        yield Finding("the same gradient", False, "0.1")

    module = ModuleType("a_client")
    module.check = check  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_client", module)
    monkeypatch.setattr(check_clients, "CLIENTS", {"a-trainer": "a_client", "another": "missing"})
    return called


def test_findings_are_printed_and_counted(
    client: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_clients.main(["--a-trainer", str(tmp_path)]) == 1
    assert client == [tmp_path.resolve()]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "a-trainer:", "the", "same", "loss", "(1e-7)"]
    assert lines[1].split() == ["FAILED", "a-trainer:", "the", "same", "gradient", "(0.1)"]
    assert lines[2] == "1 of 2 checks passed"
    assert check_clients.main(["--a-trainer", str(tmp_path), "--failures"]) == 1
    assert "the same loss" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check_clients.main([])
    assert "one of --a-trainer, --another must be given" in capsys.readouterr().err


def test_modules_of_a_checkout_are_imported_without_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("meta_path", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    inner, whole = tmp_path / "a_trainer" / "inner", tmp_path / "a_trainer" / "whole"
    for folder in (inner, whole):
        folder.mkdir(parents=True)
    for folder in (inner, tmp_path / "a_trainer"):
        (folder / "__init__.py").write_text("raise AssertionError('a whole package was imported')")
    (whole / "__init__.py").write_text("READ = True")
    (inner / "losses.py").write_text(
        "import json\nimport not_installed.parts\nfrom not_installed.parts import Base\n"
        "class Loss(Base):\n    made = Base.inner(1)\n"
    )
    stubs = prepare(tmp_path, "a_trainer", whole=["a_trainer.whole"], optional=["not_installed", "json"])
    assert stubs == ["not_installed"]
    try:
        losses = importlib.import_module("a_trainer.inner.losses")
        assert losses.Loss.__name__ == "Loss"
        assert losses.json.loads("1") == 1
        assert importlib.import_module("a_trainer.whole").READ
        assert Path(str(importlib.import_module("a_trainer").__file__)).parent == tmp_path / "a_trainer"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("a_trainer", "not_installed")]:
            del sys.modules[name]
    with pytest.raises(SystemExit, match="must be a checkout that contains another/"):
        prepare(tmp_path, "another")
