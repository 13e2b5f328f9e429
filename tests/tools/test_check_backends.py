"""tools.check_backends on a CPU: the backends that run here, and a capture that is wrong."""

import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from star_kernels.capture import attention_call
from tools import check_backends


def run(capsys):
    with warnings.catch_warnings(action="ignore"):
        status = check_backends.main(["--device", "cpu"])
    return status, capsys.readouterr().out


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(attention_call, "_warned", set())
    few = {name: check_backends.BACKENDS[name] for name in ("_native_math", "flash")}
    monkeypatch.setattr(check_backends, "BACKENDS", few)


def test_a_line_for_each_backend(capsys):
    status, out = run(capsys)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("_native_math: ok, same output, maps from a second pass")
    assert lines[1].startswith("_native_math, masked: ok, ")
    assert lines[2].startswith("flash: not run here (RuntimeError: Flash Attention backend 'flash' is not usable")
    assert lines[3] == "captures are right beside all 2 backends that run here"


def test_wrong_maps_and_another_output_fail(capsys, monkeypatch):
    computed = attention_call._ours

    def wrong(*args):
        out, maps = computed(*args)
        return out, maps * 1.01

    monkeypatch.setattr(attention_call, "_ours", wrong)
    status, out = run(capsys)
    assert status == 1
    assert "_native_math: FAILED, same output" in out
    assert out.splitlines()[-1] == "FAILED: _native_math, _native_math, masked"
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    assert "ANOTHER output" in run(capsys)[1]
