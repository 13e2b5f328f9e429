"""Fixtures of all tests: the backends, nvcc, uninitialised memory, peak memory and the comparison with float64."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import star_kernels

# The backends and the devices that they are tested on. The tests of a contract run once for each pair.
ATTENTION_BACKENDS = [("naive", "cpu"), ("vendor", "cpu")]
MAPS_BACKENDS = [("naive", "cpu"), ("auto", "cpu")]  # of attention_maps
POLICY_BACKENDS = [("naive", "cpu"), ("native", "cpu")]
if torch.cuda.is_available():
    ATTENTION_BACKENDS += [("triton", "cuda")]  # the vendors' kernels support less; see tests/attention/test_vendor.py
    MAPS_BACKENDS += [("auto", "cuda")]
    POLICY_BACKENDS += [("triton", "cuda")]
    if not star_kernels.native.problem("cuda"):
        POLICY_BACKENDS += [("native", "cuda")]

_BACKENDS = {
    "attention_backend": ATTENTION_BACKENDS,
    "maps_backend": MAPS_BACKENDS,
    "policy_backend": POLICY_BACKENDS,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, backends in _BACKENDS.items():
        if name in metafunc.fixturenames:
            ids = [backend if device == "cpu" else f"{backend}-{device}" for backend, device in backends]
            metafunc.parametrize(name, backends, ids=ids)


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.getoption("markexpr") == "not exhaustive":
        return "exhaustive tests (whole grids, ahead-of-time compiles, kill points, notebooks) run with make test-all"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(value[1] == "cuda" for value in _backends_of(item)):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    native = item.get_closest_marker("native") or ("native", "cpu") in _backends_of(item)
    if native and not _has_native():
        pytest.skip("requires the compiled CPU library")


def _backends_of(item: pytest.Item) -> list[tuple[str, str]]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return [parameters[name] for name in _BACKENDS if name in parameters]


def _has_native() -> bool:
    return star_kernels.native.load("libstar_kernels_cpu.so")[0] is not None


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The path of nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc on PATH or in CUDA_HOME")
    return found


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Programs in the background of a shell ignore SIGINT, and those of nohup SIGHUP; processes of tests would too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory with NaN, or the largest value of integers, so that unwritten results are detected."""
    strict, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all()
    assert torch.zeros(2).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline like the small Stable Diffusion 3 in the package, but smaller, with random weights."""
    pytest.importorskip("diffusers")
    from star_trainer.small import SMALL
    from star_trainer.small.pipeline import build

    folder = tmp_path_factory.mktemp("pipeline")
    build(replace(SMALL, heads=2, blocks=2, text_width=32)).save_pretrained(folder)
    return folder


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def peak_memory() -> Callable[[Callable[[], Any]], int]:
    """A function that measures the peak of PyTorch's CPU memory during a call, in bytes above that before the call."""

    def measure(function: Callable[[], Any]) -> int:
        function()  # memory that is allocated once and kept is not counted
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            result = function()
        del result
        events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        return peak

    return measure


@pytest.fixture
def assert_as_exact() -> Callable[..., None]:
    """A function that checks that the error of a result is at most twice that of PyTorch in the same dtype.

    Both errors are relative to float64. PyTorch may happen to be exact, so a rounding error is added to the limit: one
    unit in the last place of the dtype, for the rounding of the result and of an intermediate, and 16 units of float32,
    for sums of some hundred terms in another order. The latter has a scale of at least one, because a gradient is a
    difference of terms of about that size, which may cancel.
    """

    def check(name: str, got: Tensor, pytorch: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
        assert exact.dtype == torch.float64
        assert got.shape == exact.shape, name
        assert bool(got.isfinite().all()), f"{name} is not finite"
        size = float(exact.abs().max())
        rounding = torch.finfo(dtype).eps * size + 16 * torch.finfo(torch.float32).eps * max(1.0, size)
        allowed = 2 * (pytorch.double() - exact).abs().max() + rounding
        error = (got.double() - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return check
