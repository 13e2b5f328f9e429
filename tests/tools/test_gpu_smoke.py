"""tools.gpu_smoke on a CPU: the kernels that it has, failures, and the processes of the groups."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from tools import gpu_smoke


@pytest.mark.native
@pytest.mark.parametrize("group", gpu_smoke.groups("cpu"))
def test_the_kernels_of_a_cpu_agree_with_the_reference(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    if group == "capture":
        pytest.importorskip("diffusers")
    assert gpu_smoke.main(["--device", "cpu", "--only", group]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert {line.split()[0] for line in lines} == {"ok"}


def test_a_gpu_has_all_kernels() -> None:
    kinds = {"attention", "backward", "policy", "nft"}
    assert gpu_smoke.groups("cuda").keys() == {
        *("attention-triton", "attention-hopper", "attention-vendor", "maps"),
        *("backward-triton", "backward-hopper", "backward-vendor"),
        *("policy-native", "policy-triton", "nft-native", "nft-triton", "capture"),
    }
    names = [name for group in gpu_smoke.groups("cuda").values() for name, *_ in group()]
    assert len(names) == len(set(names))
    for word in ("cudnn", "flash", "efficient", "triton", "native", "4 phrases", "dense advantages", "sampling", "NFT"):
        assert any(word in name for name in names), word
    assert kinds <= {name.partition("-")[0] for name in gpu_smoke.groups("cuda")}


def test_a_failure_is_printed_and_the_other_kernels_run(capsys: pytest.CaptureFixture[str]) -> None:
    def results(value: float) -> Any:
        expected = torch.ones(3)
        return lambda: ({"out": expected * value}, {"out": expected})

    def raising() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        raise RuntimeError("illegal address\nmore")

    checks = [
        ("wrong", None, 1e-4, results(1.1)),
        ("not finite", None, 1e-4, results(torch.nan)),
        ("raises", None, 1e-4, raising),
        ("unsupported", "float64 is not supported", 1e-4, raising),
        ("right", None, 1e-4, results(1.0)),
    ]
    assert gpu_smoke.run_group(iter(checks), "cpu") == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["FAILED", "FAILED", "FAILED", "skipped", "ok"]
    assert "wrong: out has a relative error of 1.0e-01, allowed 1e-04" in lines[0]
    assert "raises: RuntimeError: illegal address" in lines[2]
    assert "float64 is not supported" in lines[3]


def test_the_summary_names_the_groups_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], timeout: float, **options: Any) -> Any:
        if command[-1] == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, {"good": 0, "bad": 1, "crashed": -11}[command[-1]])

    monkeypatch.setattr(gpu_smoke.subprocess, "run", run)
    assert gpu_smoke.run_apart(["good"], "cpu", 9.0) == 0
    assert capsys.readouterr().out == "all 1 groups of kernels agree with the reference\n"
    assert gpu_smoke.run_apart(["bad", "good", "crashed", "slow"], "cpu", 9.0) == 1
    printed = capsys.readouterr().out
    assert printed == "FAILED: bad (exit status 1), crashed (exit status -11), slow (not finished after 9 s)\n"


def test_an_unknown_group_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_smoke.main(["--device", "cpu", "--only", "nothing"])
    assert "--only must be one of attention-vendor, " in capsys.readouterr().err
