"""The CUDA kernels that write the loss, the metrics and the gradient in one launch, in the emulation."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_problems import (
    DTYPES,
    F16,
    LAYOUTS,
    Problem,
    Results,
    assert_exact,
    exact,
    make,
    misaligned,
    run,
    run_fused,
    sampled,
    spoilt,
    strided,
    with_credit,
)
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels.policy import naive
from star_kernels.policy.arguments import NftArguments, PolicyArguments

SHAPES = ["1x512", "2x64", "8x32", "16x32"]  # blocks of a cluster, threads of a block


def ones(problem: Problem) -> Tensor:
    return torch.ones(len(problem.advantages)) if problem.unreduced else torch.tensor(1.0)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal but for the order of the sums, which may change the last bits."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=3e-7)
    gradient, wanted = (tensors[2].double() for tensors in (found, expected))
    last_bit = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}[found[2].dtype]
    assert (gradient - wanted).norm() <= last_bit * wanted.norm()


def arguments_of(problem: Problem) -> Iterator[PolicyArguments | NftArguments]:
    """Both objectives, with both values of their flag; the policy loss alone for phrases or dense advantages."""
    for flag in (False, True):
        yield problem.policy(flag)
        if problem.advantages.ndim == 1:
            yield problem.nft(flag)


CASES = mostly_exhaustive(
    [(layout, dtypes, SHAPES[i % len(SHAPES)]) for i, (layout, dtypes) in enumerate(itertools.product(LAYOUTS, DTYPES))]
    + [("tiles and a bit", "float32", shape) for shape in SHAPES]
    + [("packed", "bfloat16", shape) for shape in SHAPES],
    lambda layout, dtypes, shape: (
        (layout, dtypes) in {("tiles and a bit", "float32"), ("packed", "bfloat16"), ("odd", "float32")}
    ),
)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize(("layout", "dtypes", "shape"), CASES)
def test_one_launch_gives_the_results_of_two(emulated: Any, layout: str, dtypes: str, shape: str, extras: bool) -> None:
    problem = make(layout, dtypes, extras)
    for arguments, broken in zip(arguments_of(problem), arguments_of(spoilt(problem)), strict=True):
        found = run_fused(emulated, broken, shape)
        assert emulated.cluster_size() <= int(shape.split("x")[0])
        assert_same(found, run(emulated, broken, ones(problem)))
        assert all(torch.equal(a, b) for a, b in zip(found, run_fused(emulated, broken, shape), strict=True))
        if found[2].dtype != F16:  # whose gradients for an upstream gradient of one are no normal numbers
            loss = naive.weighted_policy_loss if isinstance(arguments, PolicyArguments) else naive.weighted_nft_loss
            assert_exact(found, exact(loss, arguments, ones(problem)))
        if extras:
            assert not found[2][~problem.mask.unsqueeze(problem.channel_dim).expand_as(found[2])].any()


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("credit", ["1", "2", "5", "40", "dense", "unweighted dense"])
@pytest.mark.parametrize(
    ("layout", "dtypes", "shape"),
    mostly_exhaustive(
        [
            ("tiles and a bit", "float32", "16x32"),
            ("packed", "mixed", "2x32"),
            ("runs across rows", "bfloat16", "8x32"),
        ],
        [("tiles and a bit", "float32", "16x32")],
    ),
)
def test_phrases_and_dense_advantages_in_one_launch(
    emulated: Any, layout: str, dtypes: str, shape: str, credit: str, extras: bool
) -> None:
    problem = with_credit(make(layout, dtypes, extras), layout, credit)
    size = float(problem.advantages.abs().max()) * (int(credit) if credit.isdigit() else 1)
    for per_location in (False, True):
        broken = spoilt(problem).policy(per_location)
        found = run_fused(emulated, broken, shape)
        assert_same(found, run(emulated, broken, ones(problem)))
        assert_exact(found, exact(naive.weighted_policy_loss, problem.policy(per_location), ones(problem)), size)


@pytest.mark.parametrize("option", ["weights", "mask", "step_weights", "reference", "guard", "unreduced"])
def test_each_option_alone_in_one_launch(emulated: Any, option: str) -> None:
    for layout in ("patch grid", "packed"):
        problem = make(layout)
        problem = replace(problem, **{option: getattr(make(layout, extras=True), option)})
        for arguments in arguments_of(spoilt(problem)):
            assert_same(run_fused(emulated, arguments, "8x32"), run(emulated, arguments, ones(problem)))


@pytest.mark.parametrize("layout", mostly_exhaustive(LAYOUTS, ["tiles and a bit", "packed"]))
def test_every_layout_takes_one_launch(emulated: Any, layout: str) -> None:
    problem = make(layout, extras=True)
    latents = ("output", "sample", "prev", "old", "reference")
    moved = replace(problem, **{name: strided(getattr(problem, name)) for name in latents})
    for variant in (problem.map(misaligned), moved):
        for arguments, wanted in zip(arguments_of(variant), arguments_of(problem), strict=True):
            found, expected = run_fused(emulated, arguments, "8x32"), run(emulated, wanted, ones(problem))
            torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ratio_of_an_unchanged_model_is_one(emulated: Any, shape: str) -> None:
    for layout, dtypes in (("tiles and a bit", "float32"), ("many channels", "bfloat16"), ("packed", "float16 alone")):
        problem = make(layout, dtypes)
        prev, log_prob = sampled(emulated, problem)
        step = replace(problem, prev=prev, old_log_prob=log_prob, old=problem.output.clone())
        for variant in (step, step.map(misaligned), replace(step, guard=True)):
            for per_location in (False, True):
                _, metrics, _ = run_fused(emulated, variant.policy(per_location), shape)
                assert metrics[0].item() == metrics[1].item() == 1.0


def test_the_largest_cluster_is_the_one_that_the_device_runs(emulated: Any) -> None:
    problem = make("tiles and a bit")
    expected = run(emulated, problem.policy(False), torch.tensor(1.0))
    try:
        for largest, launches in ((16, 1), (8, 1), (1, 2)):
            emulated.limit_clusters(largest)
            found = run_fused(emulated, problem.policy(False), "16x32", launches=launches)
            assert_same(found, expected)
            if launches == 1:
                assert emulated.cluster_size() == largest
    finally:
        emulated.limit_clusters(16)


def test_a_sample_that_does_not_fit_takes_two_launches(emulated: Any) -> None:
    shape, generator = (1, 16, 60, 64), torch.Generator().manual_seed(0)
    output, sample, prev, old = torch.randn(4, *shape, generator=generator).unbind()
    problem = replace(make("many channels"), output=output, sample=sample, prev=prev, old=old)
    problem = replace(problem, old_log_prob=-torch.rand(1, 60, 64, generator=generator))
    for shape_of_launch, launches in (("1x256", 2), ("2x256", 1), ("0", 2)):
        found = run_fused(emulated, problem.policy(False), shape_of_launch, launches=launches)
        assert_same(found, run(emulated, problem.policy(False), torch.tensor(1.0)))


@pytest.mark.parametrize("layout", ["tiles and a bit", "packed"])
def test_a_written_gradient_is_kept_for_ones_and_recomputed_otherwise(emulated: Any, layout: str) -> None:
    problem = make(layout, extras=True)
    for reduced in (problem, replace(problem, unreduced=False)):
        upstream = torch.ones(len(problem.advantages)) if reduced.unreduced else torch.tensor(1.0)
        for arguments in arguments_of(reduced):
            results = Results(emulated, arguments)
            results.forward(gradient=True, launches=1)
            results.gradient.fill_(7.0)
            results.backward(upstream, written=True)
            assert bool((results.gradient == 7.0).all())
            other = upstream.clone().flatten()
            other[-1] = 1.0 + 2**-23
            other = other.view_as(upstream)
            results.backward(other, written=True)
            expected = run(emulated, arguments, other)[2]
            if reduced.unreduced:
                assert bool((results.gradient[:-1] == 7.0).all())
                torch.testing.assert_close(results.gradient[-1], expected[-1])
            else:
                torch.testing.assert_close(results.gradient, expected)


def test_a_nan_in_one_sample_stays_visible_and_out_of_the_others(emulated: Any) -> None:
    problem = make("tiles and a bit")
    broken = replace(problem, output=problem.output.clone())
    broken.output[1].view(-1)[5] = torch.nan
    for clean, spoiled in zip(arguments_of(problem), arguments_of(broken), strict=True):
        expected, found = run_fused(emulated, clean), run_fused(emulated, spoiled)
        assert found[0].isnan()
        assert found[2][1].isnan().any()
        assert torch.equal(found[2][0], expected[2][0])


FAULTS = {
    1: "a read of a block's shared memory before a barrier of the cluster",
    2: "a read of the shared memory of a block that has ended",
    3: "a barrier of a cluster that some thread does not reach",
    4: "a thread ends without waiting for its cluster",
}
COMMAND = """
import os, sys, tvm_ffi
for fault in map(int, sys.argv[2:]):
    if os.fork() == 0:
        tvm_ffi.load_module(sys.argv[1]).exchange(fault, 4)
        os._exit(0)
    assert os.wait()[1] != 0
"""


def test_the_emulation_finds_a_barrier_that_is_missing(emulated_library: str) -> None:
    command = [sys.executable, "-c", COMMAND, emulated_library, *map(str, FAULTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"CUDA emulation: {problem}" for problem in FAULTS.values()]


def test_the_emulation_gives_nan_for_shared_memory_that_is_not_written(emulated: Any) -> None:
    assert emulated.exchange(0, 4) == 16.0
    late = emulated.exchange(5, 4)
    assert late != late
