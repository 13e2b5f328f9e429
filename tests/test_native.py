"""The compiled library: loading, what happens without it, instruction sets, and memory that PyTorch does not count."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from star_kernels import TokenSelection, attention, flow_sde, native, sample_transition, weighted_policy_loss


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in place of the compiled libraries."""
    caches = (native.load, native.cpu, native.cuda)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def policy_results(backend: str = "auto") -> list[torch.Tensor]:
    output, sample, noise = torch.randn(3, 2, 4, 20, 20, generator=torch.Generator().manual_seed(0))
    transition = flow_sde(torch.tensor([0.9, 0.5]), 0.3, sigma_max=0.95)
    prev, log_prob = sample_transition(output, sample, transition, noise=noise, backend=backend)
    leaf = (output + 0.01 * noise).requires_grad_()
    weights = torch.rand(2, 10, 5, generator=torch.Generator().manual_seed(1))
    loss, metrics = weighted_policy_loss(
        leaf,
        sample,
        prev,
        log_prob,
        torch.tensor([1.0, -1.0]),
        transition,
        weights=weights,
        clip_range=0.5,
        backend=backend,
    )
    loss.backward()
    return [prev, log_prob, loss.detach(), 1000 * leaf.grad, *metrics.values()]


@pytest.mark.native
def test_the_library_names_the_instruction_set_it_uses() -> None:
    library = native.cpu()
    assert library.isa() in library.runnable_isas().split()
    assert "baseline" in library.runnable_isas().split()


def test_without_the_library_everything_runs_with_one_warning(no_library: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = policy_results()
        query = torch.randn(1, 2, 9, 8)
        attention(query, query, query, TokenSelection.from_positions([[1]]))
        policy_results()
    found = [w for w in caught if "star_kernels" in str(w.message)]
    assert len(found) == 1
    assert issubclass(found[0].category, UserWarning)
    assert "libstar_kernels_cpu.so" in str(found[0].message)
    for got, want in zip(results, policy_results("naive"), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"backend 'native' cannot run here: .*was not built"):
        policy_results("native")


def test_a_file_that_is_not_a_library_is_reported_without_an_exception(no_library: Path) -> None:
    (no_library / "libstar_kernels_cpu.so").write_bytes(b"not a library")
    library, problem = native.load("libstar_kernels_cpu.so")
    assert library is None
    assert "cannot be loaded" in problem


@pytest.mark.exhaustive
@pytest.mark.native
def test_libraries_are_loaded_from_the_folder_that_the_environment_names(tmp_path: Path) -> None:
    (tmp_path / "libstar_kernels_cpu.so").symlink_to(native.FOLDER / "libstar_kernels_cpu.so")
    code = "from star_kernels import native; print(native.FOLDER, native.cpu().isa(), native.load('none.so')[1])"
    environment = {**os.environ, "STAR_KERNELS_LIB": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == [str(tmp_path), native.cpu().isa()]
    assert f"{tmp_path}/none.so was not built" in done.stdout


_STEPS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from star_kernels import native
assert native.cpu().isa() == sys.argv[1], native.cpu().isa()
import test_native
for got, want in zip(test_native.policy_results("native"), test_native.policy_results("naive"), strict=True):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
torch.save(test_native.policy_results("native"), sys.argv[3])
"""


@pytest.mark.exhaustive
@pytest.mark.native
def test_every_instruction_set_that_runs_here_gives_the_same_bits_of_log_prob(tmp_path: Path) -> None:
    found = {}
    for isa in native.cpu().runnable_isas().split():
        arguments = [sys.executable, "-c", _STEPS, isa, str(Path(__file__).parent), str(tmp_path / isa)]
        environment = {**os.environ, "STAR_KERNELS_ISA": isa}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[isa] = torch.load(tmp_path / isa)
    first = next(iter(found.values()))
    for isa, results in found.items():
        for got, want in zip(results[:2], first[:2], strict=True):  # no contraction may differ, see csrc/flow_policy.h
            assert torch.equal(got, want), isa
        torch.testing.assert_close(results, first, rtol=1e-6, atol=1e-6)


@pytest.mark.native
def test_an_unknown_instruction_set_is_named() -> None:
    code = "from star_kernels import native; print(native.load('libstar_kernels_cpu.so')[1])"
    environment = {**os.environ, "STAR_KERNELS_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "STAR_KERNELS_ISA must be one of" in done.stdout
    assert "got mmx" in done.stdout


_MEMORY = """
import re, torch
from star_kernels import flow_sde, weighted_policy_loss

def peak():
    # of this program alone: getrusage would count what the process was before it started this program
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def growth(height):
    output, sample, prev = (torch.randn(8, 16, height, 64) for _ in range(3))
    old_log_prob, advantages = torch.zeros(8, height, 64), torch.ones(8)
    transition = flow_sde(0.8, 0.7, sigma_max=0.95)
    output.requires_grad_()
    before = peak()
    weighted_policy_loss(output, sample, prev, old_log_prob, advantages, transition).loss.backward()
    return (peak() - before) / output.nbytes

growth(64)
ballast = torch.ones(2**26)  # more than loading needed, so that later allocations raise the peak
print(growth(1024))
"""


@pytest.mark.exhaustive
@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory")
def test_memory_outside_pytorch_does_not_exceed_one_gradient() -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 1.1  # a tenth for the allocator's pages
