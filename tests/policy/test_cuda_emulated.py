"""The CUDA kernels without a GPU: csrc/cuda compiled for the host, with a fiber for each thread of a block."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_problems import (
    DTYPES,
    LAYOUTS,
    VECTOR,
    assert_exact,
    exact,
    make,
    misaligned,
    run,
    run_fused,
    sampled,
    spoilt,
    strided,
    upstream_of,
    with_credit,
)
from tiers import mostly_exhaustive

from star_kernels import native
from star_kernels.policy import naive

QUICK = {"tiles and a bit", "runs across rows", "odd", "packed"}
CASES = mostly_exhaustive(
    itertools.product(LAYOUTS, DTYPES), lambda layout, dtypes: layout in QUICK and dtypes in ("float32", "mixed")
)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize(("layout", "dtypes"), CASES)
def test_loss_metrics_and_gradient_are_those_of_the_reference(
    emulated: Any, layout: str, dtypes: str, extras: bool
) -> None:
    problem = make(layout, dtypes, extras)
    upstream = upstream_of(problem)
    for per_location in (False, True):
        expected = exact(naive.weighted_policy_loss, problem.policy(per_location), upstream)
        found = run(emulated, spoilt(problem).policy(per_location), upstream)
        assert_exact(found, expected)
        expected = exact(naive.weighted_nft_loss, problem.nft(per_location), upstream)
        assert_exact(run(emulated, spoilt(problem).nft(per_location), upstream), expected)
        if extras:
            dropped = ~problem.mask.unsqueeze(problem.channel_dim).expand_as(found[2])
            assert not found[2][dropped].any()


CREDITS = ["1", "2", "4", "5", "40", "dense", "unweighted dense"]
CREDIT_CASES = mostly_exhaustive(
    # Each layout with each kind of credit, in one of the dtypes, and the quick ones.
    dict.fromkeys(
        [
            *(
                (layout, dtypes, credit)
                for (layout, credit), dtypes in zip(
                    itertools.product(LAYOUTS, CREDITS), itertools.cycle(["float32", "bfloat16", "mixed"]), strict=False
                )
            ),
            *(
                (layout, dtypes, credit)
                for layout in ("tiles and a bit", "runs across rows", "packed")
                for dtypes, credit in (("float32", "5"), ("mixed", "2"), ("float32", "dense"))
            ),
        ]
    ),
    lambda layout, dtypes, credit: (
        layout in ("tiles and a bit", "runs across rows", "packed")
        and (dtypes, credit) in (("float32", "5"), ("mixed", "2"), ("float32", "dense"))
    ),
)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize(("layout", "dtypes", "credit"), CREDIT_CASES)
def test_phrases_and_dense_advantages_are_those_of_the_reference(
    emulated: Any, layout: str, dtypes: str, credit: str, extras: bool
) -> None:
    problem = with_credit(make(layout, dtypes, extras), layout, credit)
    upstream = upstream_of(problem)
    size = float(problem.advantages.abs().max()) * (int(credit) if credit.isdigit() else 1)
    for per_location in (False, True):
        expected = exact(naive.weighted_policy_loss, problem.policy(per_location), upstream)
        found = run(emulated, spoilt(problem).policy(per_location), upstream)
        assert_exact(found, expected, size)
        if extras:
            assert not found[2][~problem.mask.unsqueeze(problem.channel_dim).expand_as(found[2])].any()


@pytest.mark.parametrize("layout", ["tiles and a bit", "packed"])
def test_a_single_phrase_has_the_bits_of_advantages_of_samples(emulated: Any, layout: str) -> None:
    phrase = with_credit(make(layout, extras=True), layout, "1")
    plain = replace(phrase, advantages=phrase.advantages[:, 0], weights=phrase.weights[:, 0])
    for per_location in (False, True):
        arguments = [p.policy(per_location)._replace(weighted_kl=False) for p in (phrase, plain)]
        both = [run(emulated, each, upstream_of(phrase)) for each in arguments]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("credit", ["2", "dense"])
def test_a_ratio_that_overflows_costs_only_advantages_that_it_does_not_clip(emulated: Any, credit: str) -> None:
    """An infinite ratio is clipped for a positive advantage; the sum for negative ones is then zero, not 0 * inf."""
    for layout in ("tiles and a bit", "packed"):
        problem = with_credit(make(layout), layout, credit)
        problem = replace(problem, advantages=problem.advantages.abs(), old_log_prob=problem.old_log_prob - 400)
        for per_location in (False, True):
            loss, _, gradient = run(emulated, problem.policy(per_location), torch.tensor(1.0))
            expected = naive.weighted_policy_loss(problem.policy(per_location))[0]
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
            assert not gradient.any()


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("credit", ["plain", "1", "5", "dense"])
@pytest.mark.parametrize(
    ("layout", "dtypes"),
    mostly_exhaustive(
        [("tiles and a bit", "float32"), ("packed", "mixed"), ("runs across rows", "bfloat16"), ("odd", "float32")],
        [("tiles and a bit", "float32"), ("packed", "mixed")],
    ),
)
def test_a_mask_of_the_divergence_is_that_of_the_reference(
    emulated: Any, layout: str, dtypes: str, credit: str, extras: bool
) -> None:
    # The mask also asks whether a ratio is above one: no ratio may be one but for rounding.
    problem = replace(make(layout, dtypes, extras, drift=0.05), kl_mask=True)
    problem = problem if credit == "plain" else with_credit(problem, layout, credit)
    upstream = upstream_of(problem)
    size = float(problem.advantages.abs().max()) * (int(credit) if credit.isdigit() else 1)
    for per_location in (False, True):
        arguments = problem.policy(per_location)
        expected = exact(naive.weighted_policy_loss, arguments, upstream)
        assert_exact(run(emulated, spoilt(problem).policy(per_location), upstream), expected, size)
        fused = run_fused(emulated, arguments, "8x32", launches=2)
        assert_exact(fused, exact(naive.weighted_policy_loss, arguments, torch.ones_like(upstream)), size)


OPTIONS = ["weights", "mask", "step_weights", "reference", "guard", "unreduced"]


@pytest.mark.parametrize("layout", mostly_exhaustive(["patch grid", "packed"], ["packed"]))
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_alone(emulated: Any, option: str, layout: str) -> None:
    problem, every = make(layout), make(layout, extras=True)
    problem = replace(problem, **{option: getattr(every, option)})
    upstream = upstream_of(problem)
    for flag in (False, True):
        expected = exact(naive.weighted_policy_loss, problem.policy(flag), upstream)
        assert_exact(run(emulated, spoilt(problem).policy(flag), upstream), expected)
        expected = exact(naive.weighted_nft_loss, problem.nft(flag), upstream)
        assert_exact(run(emulated, spoilt(problem).nft(flag), upstream), expected)


@pytest.mark.parametrize("layout", mostly_exhaustive(LAYOUTS, QUICK))
def test_aligned_latents_are_read_16_bytes_at_a_time_and_others_give_the_same(emulated: Any, layout: str) -> None:
    latents = ("output", "sample", "prev", "old", "reference")
    for dtypes in ("float32", "float16 alone"):
        problem = make(layout, dtypes, extras=True)
        variants = [problem, problem.map(misaligned)]
        variants.append(replace(problem, **{name: strided(getattr(problem, name)) for name in latents}))
        upstream, found = upstream_of(problem), []
        for variant in variants:
            before = emulated.wide_loads()
            results = [run(emulated, variant.policy(flag), upstream) for flag in (False, True)]
            results += [run(emulated, variant.nft(flag), upstream) for flag in (False, True)]
            wide = emulated.wide_loads() > before
            if dtypes == "float32":
                assert wide == (layout in VECTOR and variant is problem)
            for credit in ("2", "dense"):
                moved = with_credit(problem, layout, credit)
                if variant is variants[1]:
                    moved = moved.map(misaligned)
                elif variant is variants[2]:
                    moved = replace(moved, **{name: getattr(variant, name) for name in latents})
                results += [run(emulated, moved.policy(flag), upstream) for flag in (False, True)]
            found.append(results)
        for other in found[1:]:
            for got, want in zip(other, found[0], strict=True):
                torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
                torch.testing.assert_close(got[2], want[2], rtol=1e-3 if dtypes != "float32" else 1e-5, atol=1e-8)


@pytest.mark.native
@pytest.mark.parametrize(("layout", "dtypes"), CASES)
def test_sampling_equals_the_cpu_kernel_and_the_ratio_of_an_unchanged_model_is_one(
    emulated: Any, layout: str, dtypes: str
) -> None:
    problem = make(layout, dtypes)
    prev, log_prob = sampled(emulated, problem)
    cpu_prev, cpu_log_prob = sampled(native.cpu(), problem, 1)
    assert torch.equal(prev, cpu_prev)
    torch.testing.assert_close(log_prob, cpu_log_prob, rtol=1e-6, atol=1e-6)
    for drawn in (problem, problem.map(misaligned), replace(problem, noise=problem.noise.to(problem.sample.dtype))):
        prev, log_prob = sampled(emulated, drawn)
        step = replace(problem, prev=prev, old_log_prob=log_prob, old=problem.output.clone())
        for variant in (step, step.map(misaligned), replace(step, guard=True)):
            for per_location in (False, True):
                _, metrics, _ = run(emulated, variant.policy(per_location), torch.tensor(1.0))
                assert metrics[0].item() == metrics[1].item() == 1.0


def test_uniform_weights_give_the_bits_of_none(emulated: Any) -> None:
    for layout in ("tiles and a bit", "packed"):
        problem = make(layout)
        uniform = replace(problem, weights=torch.ones_like(problem.old_log_prob))
        for flag in (False, True):
            for name in ("policy", "nft"):
                both = [run(emulated, getattr(p, name)(flag), torch.tensor(1.0)) for p in (problem, uniform)]
                assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_nan_in_one_sample_stays_visible_and_out_of_the_others_gradients(emulated: Any) -> None:
    for layout in ("tiles and a bit", "packed"):
        problem = make(layout)
        broken = replace(problem, output=problem.output.clone())
        broken.output[1].view(-1)[5] = torch.nan
        for flag in (False, True):
            for name in ("policy", "nft"):
                clean, found = (run(emulated, getattr(p, name)(flag), torch.tensor(1.0)) for p in (problem, broken))
                assert found[0].isnan()
                assert found[1][:2].isnan().all()
                assert found[2][1].isnan().any()
                assert torch.equal(found[2][0], clean[2][0])
