"""Which backend "auto" chooses for the policy functions, and why the others cannot run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from star_kernels import native
from star_kernels.policy import backends
from star_kernels.policy.backends import choose_backend, obstacle


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with neither compiled kernels nor Triton."""
    caches = (backends._triton_problem, backends._warn_naive)
    monkeypatch.setattr(native, "problem", lambda device: f"no library for {device}")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_compiled_kernels_come_first_and_then_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_problem", lambda: "")
    missing: set[str] = set()
    monkeypatch.setattr(native, "problem", lambda device: "not built" if device in missing else "")
    assert choose_backend("cpu", torch.float32) == choose_backend("cuda", torch.bfloat16) == "native"
    missing |= {"cpu", "cuda"}
    assert choose_backend("cuda", torch.bfloat16) == "triton"
    assert choose_backend("cpu", torch.bfloat16) == "naive"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float64_runs_the_reference(device: str) -> None:
    assert choose_backend(device, torch.float64) == "naive"
    assert obstacle("naive", device, torch.float64) is None
    for backend in ("native", "triton"):
        assert obstacle(backend, device, torch.float64) == "float64 is not supported"


def test_a_gpu_that_falls_back_to_the_reference_warns_once(bare: None, recwarn: pytest.WarningsRecorder) -> None:
    assert choose_backend("cuda", torch.float32) == "naive"
    assert choose_backend("cuda", torch.float32) == "naive"
    (message,) = [str(warning.message) for warning in recwarn]
    assert "no library for cuda, and the package triton is not installed" in message


def test_a_cpu_that_falls_back_to_the_reference_does_not_warn(bare: None, recwarn: pytest.WarningsRecorder) -> None:
    """The missing library has warned already."""
    assert choose_backend("cpu", torch.float32) == "naive"
    assert not recwarn
