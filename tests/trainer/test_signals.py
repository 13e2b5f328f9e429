"""Signals ask a run to end, and the callback runs immediately."""

from __future__ import annotations

import importlib
import io
import os
import signal
import threading
import warnings
from pathlib import Path

import pytest
from kill_points import in_child

from star_trainer import command, signals, start
from star_trainer.signals import CAUGHT, Signals

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("number", CAUGHT)
def test_a_signal_calls_back_once_and_stops(number: signal.Signals) -> None:
    told, heard = list[str](), threading.Event()

    def tell(name: str) -> None:
        told.append(name)
        heard.set()

    before = [signal.getsignal(n) for n in CAUGHT]
    with Signals(tell) as caught:
        assert not caught.stopped
        signal.raise_signal(number)
        assert caught.stopped
        assert heard.wait(60)
        signal.raise_signal(signal.SIGTERM)
    assert told == [number.name]
    assert [signal.getsignal(n) for n in CAUGHT] == before


def test_the_callback_runs_while_the_main_thread_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits within C++ does not run Python's handler."""
    monkeypatch.setattr(Signals, "_stop", lambda self, number, frame: None)
    heard = threading.Event()
    with Signals(lambda name: heard.set()) as caught:
        signal.raise_signal(signal.SIGTERM)
        assert heard.wait(60)
        assert caught.stopped


def test_a_second_interrupt_exits_immediately() -> None:
    """While the callback of the first one is still running."""

    def interrupted_twice() -> None:
        with Signals(lambda name: threading.Event().wait()):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            threading.Event().wait()

    assert in_child(interrupted_twice) == 128 + signal.SIGINT


def test_an_interrupt_that_torchrun_forwards_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(signals, "ECHO", 1e9)

    def interrupted_twice() -> None:
        with Signals(lambda name: None):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    assert in_child(interrupted_twice) == 0


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with Signals(lambda name: None) as caught:
            signal.raise_signal(signal.SIGHUP)
        assert not caught.stopped
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_of_other_handlers_are_ignored() -> None:
    seen, told = list[int](), list[str]()
    before = signal.signal(signal.SIGWINCH, lambda number, frame: seen.append(number))
    try:
        with Signals(told.append) as caught:
            signal.raise_signal(signal.SIGWINCH)
        assert not caught.stopped
        assert (seen, told) == ([signal.SIGWINCH], [])
    finally:
        signal.signal(signal.SIGWINCH, before)


def test_signals_of_forked_processes_do_not_end_the_run() -> None:
    told = list[str]()
    with warnings.catch_warnings(), Signals(told.append) as caught:
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks beside threads
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)  # ignored
            signal.raise_signal(signal.SIGTERM)
            os._exit(3)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert (caught.stopped, told) == (False, [])


def test_no_signal_is_caught_outside_the_main_thread() -> None:
    before = [signal.getsignal(n) for n in CAUGHT]
    found = []

    def run() -> None:
        with Signals(lambda name: None):
            found.extend(signal.getsignal(n) for n in CAUGHT)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == before


def test_the_exit_of_the_launcher_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's launcher for one process does not forward signals."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(signals, "LOOK", 0.01)
    receive, send = os.pipe()

    def launcher() -> None:
        started, start = os.pipe()
        if os.fork() == 0:
            heard = threading.Event()
            with Signals(lambda reason: heard.set()) as caught:
                os.write(start, b".")
                heard.wait(60)
                os.write(send, b"told" if caught.stopped else b"nothing")
            os._exit(0)
        os.read(started, 1)

    assert in_child(launcher) == 0
    assert os.read(receive, 9) == b"told"
    os.close(receive)
    os.close(send)


def test_a_process_with_a_running_reward_skips_pythons_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's exit would abort while a thread is within C++."""

    def main() -> int:
        threading.Thread(target=threading.Event().wait, name="reward call", daemon=True).start()
        return 7

    monkeypatch.setattr(command, "main", main)
    assert in_child(command.entry) == 7


def test_the_commands_start_their_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'star-train = "star_trainer.start:train"' in project
    assert 'star-train-small = "star_trainer.start:small"' in project
    monkeypatch.setattr(command, "entry", lambda: 3)
    with pytest.raises(SystemExit, match="3"):
        start.train()
    monkeypatch.setattr(importlib.import_module("star_trainer.small.command"), "main", lambda: 4)
    with pytest.raises(SystemExit, match="4"):
        start.small()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None if name in ("peft", "yaml") else object())
    with pytest.raises(SystemExit, match="2"):
        start.train()
    told = capsys.readouterr().err
    assert told == "star-train: error: requires peft, yaml: pip install 'star-kernels[train]'\n"


def test_characters_outside_the_terminals_encoding_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(command.sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    monkeypatch.setattr(command, "main", lambda: print("l\u00e4ufe"))
    monkeypatch.setattr(command.threading, "enumerate", lambda: [])  # other tests' rewards may be at work
    with pytest.raises(SystemExit):
        command.entry()
    assert written.getvalue() == rb"l\xe4ufe" + b"\n"
