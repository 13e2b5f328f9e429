"""Invalid input to the policy functions: errors name the argument, the value and what is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_kernels import (
    dance_sde,
    flow_cps,
    flow_matching,
    flow_sde,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)

NAN, INF = torch.nan, torch.inf
LATENT = torch.zeros(2, 4, 6, 8)
ROWS = torch.zeros(2, 6, 8)
ONES = torch.ones(2)
STEP = flow_sde(torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.4]), sigma_max=0.95)
THREE = flow_sde(torch.tensor([0.9, 0.5, 0.4]), 0.3, sigma_max=0.95)
GOOD = {
    "model_output": LATENT,
    "sample": LATENT,
    "prev_sample": LATENT,
    "old_log_prob": ROWS,
    "advantages": ONES,
    "transition": STEP,
}


def weights(value: float) -> torch.Tensor:
    bad = torch.ones(2, 3, 4)
    bad[1, 2, 1] = value
    return bad


LATENT_ERRORS = [
    ("model_output", [1.0], TypeError, "model_output must be a tensor, got list"),
    (
        "model_output",
        LATENT.int(),
        TypeError,
        "model_output must be float32, float16, bfloat16 or float64, got torch.int32",
    ),
    ("model_output", LATENT[0, 0], ValueError, r"model_output must have 3 to 5 dimensions.*got \[6, 8\]"),
    (
        "model_output",
        LATENT[:, :0],
        ValueError,
        r"model_output must have 3 to 5 dimensions, none of them 0.*got \[2, 0, 6, 8\]",
    ),
    ("sample", None, TypeError, "sample must be a tensor, got NoneType"),
    (
        "sample",
        LATENT[:1],
        ValueError,
        r"sample must have the shape of model_output, \[2, 4, 6, 8\], got \[1, 4, 6, 8\]",
    ),
    ("sample", LATENT[..., None], ValueError, r"sample must have the shape of model_output, .*got \[2, 4, 6, 8, 1\]"),
    ("sample", LATENT.int(), TypeError, "sample must be float32, float16, bfloat16 or float64, got torch.int32"),
    ("sample", LATENT.double(), TypeError, "sample must be float64 exactly if model_output is.*got torch.float64"),
    ("sample", LATENT.to("meta"), ValueError, "sample must be on the device of model_output, cpu, got meta"),
    ("transition", STEP.coefficients, TypeError, "transition must be a Transition .*got Tensor"),
    ("transition", THREE, ValueError, "transition must have one column, or one for each of the 2 samples, got 3"),
    ("transition", STEP.to("meta"), ValueError, "transition must be on the device of model_output, cpu, got meta"),
    ("channel_dim", 0, ValueError, r"channel_dim must name a dimension of model_output after the batch.*got 0"),
    ("channel_dim", 4, ValueError, r"channel_dim must name a dimension of model_output after the batch.*got 4"),
    ("channel_dim", -4, ValueError, r"channel_dim must name a dimension of model_output after the batch.*got -4"),
    ("channel_dim", 1.5, TypeError, "channel_dim .*1.5"),
    ("channel_dim", None, TypeError, "channel_dim .*None"),
    ("channel_dim", True, TypeError, "channel_dim .*True"),
    ("backend", "cuda", ValueError, "backend must be one of auto, .*got 'cuda'"),
    ("backend", None, ValueError, "backend must be one of auto, .*got None"),
]
LOSS_ERRORS = [
    ("prev_sample", LATENT[:, :2], ValueError, r"prev_sample must have the shape of model_output.*got \[2, 2, 6, 8\]"),
    ("prev_sample", 3, TypeError, "prev_sample must be a tensor, got int"),
    (
        "old_log_prob",
        ROWS[:, :5],
        ValueError,
        r"old_log_prob must have shape \[B, \*locations\] = \[2, 6, 8\], got \[2, 5, 8\]",
    ),
    ("old_log_prob", LATENT, ValueError, r"old_log_prob must have shape .*got \[2, 4, 6, 8\]"),
    ("old_log_prob", torch.ones(3), ValueError, r"old_log_prob must have shape .*got \[3\]"),
    ("old_log_prob", torch.ones(()), ValueError, r"old_log_prob must have shape .*got \[\]"),
    ("old_log_prob", ROWS.half(), TypeError, "old_log_prob must be a float32 tensor, got torch.float16"),
    ("old_log_prob", ROWS.double(), TypeError, "old_log_prob must be float32 .*got torch.float64"),
    ("old_log_prob", ROWS.to("meta"), ValueError, "old_log_prob must be on the device of model_output, cpu, got meta"),
    ("old_log_prob", 0.5, TypeError, "old_log_prob must be a float32 tensor, got float"),
    ("advantages", ONES.view(2, 1, 1), ValueError, r"advantages must have shape \[B\] = \[2\], .*got .*\[2, 1, 1\]"),
    ("advantages", torch.ones(3), ValueError, r"advantages must have shape \[B\] = \[2\].*got .*\[3\]"),
    ("advantages", None, TypeError, "advantages must be a float32 tensor, got NoneType"),
    ("advantages", ONES.int(), TypeError, "advantages must be a float32 tensor, got torch.int32"),
    ("advantages", ONES.to("meta"), ValueError, "advantages must be on the device of model_output, cpu, got meta"),
    ("weights", weights(NAN), ValueError, "weights must be finite and not negative, got nan"),
    ("weights", weights(INF), ValueError, "weights must be finite and not negative, got inf"),
    ("weights", weights(-0.5), ValueError, "weights must be finite and not negative, got -0.5"),
    (
        "weights",
        torch.ones(2, 4, 4),
        ValueError,
        r"weights must have shape .*= \[2, 6, 8\] or .*divides it, got \[2, 4, 4\]",
    ),
    ("weights", torch.ones(2, 12, 8), ValueError, r"weights must have shape .*got \[2, 12, 8\]"),
    ("weights", torch.ones(2, 48), ValueError, r"weights must have shape .*got \[2, 48\]"),
    ("weights", torch.ones(2, 0, 8), ValueError, r"weights must have shape .*got \[2, 0, 8\]"),
    ("weights", torch.ones(1, 6, 8), ValueError, r"weights must have shape .*got \[1, 6, 8\]"),
    ("weights", torch.ones(2, 6, 8).half(), TypeError, "weights must be a float32 tensor, got torch.float16"),
    (
        "weights",
        torch.ones(2, 6, 8, device="meta"),
        ValueError,
        "weights must be on the device of model_output, cpu, got meta",
    ),
    ("ratio", "token", ValueError, "ratio must be 'sample' or 'location', got 'token'"),
    ("clip_range", -0.1, ValueError, "clip_range must be at least 0.*got -0.1"),
    ("clip_range", 1.5, ValueError, "clip_range must be at least 0, its lower half at most 1, got 1.5"),
    ("clip_range", NAN, ValueError, "clip_range must be .*got nan"),
    ("clip_range", (0.1, -0.1), ValueError, r"clip_range must be .*got \(0.1, -0.1\)"),
    ("clip_range", (0.1,), ValueError, r"clip_range .*\(0.1,\)"),
    ("clip_range", (0.1, 0.2, 0.3), ValueError, r"clip_range .*\(0.1, 0.2, 0.3\)"),
    ("clip_range", "wide", TypeError, "clip_range .*wide"),
    ("weighted_kl", None, TypeError, "weighted_kl must be True or False, got None"),
    ("clip_range", (0.1, 10**400), ValueError, "clip_range must be a float .*got an integer of 1329 bits"),
    ("advantage_clip", 2**63, ValueError, "advantage_clip must be a float .*got an integer of 64 bits"),
    ("kl_coef", 10**400, ValueError, "kl_coef must be a float .*got an integer of 1329 bits"),
    ("advantage_clip", 0.0, ValueError, "advantage_clip must be positive, got 0.0"),
    ("advantage_clip", NAN, ValueError, "advantage_clip must be positive, got nan"),
    ("advantage_clip", None, TypeError, "advantage_clip .*None"),
    ("kl_coef", -0.1, ValueError, "kl_coef must be finite and at least 0, got -0.1"),
    ("kl_coef", INF, ValueError, "kl_coef must be finite and at least 0, got inf"),
    ("kl_coef", 0.1, ValueError, "ref_model_output must be given if kl_coef is not 0, got None"),
    (
        "ref_model_output",
        LATENT[:1],
        ValueError,
        r"ref_model_output must have the shape of model_output.*got \[1, 4, 6, 8\]",
    ),
    (
        "ref_model_output",
        LATENT.to("meta"),
        ValueError,
        "ref_model_output must be on the device of model_output, cpu, got meta",
    ),
]


NO_MASK = torch.ones(2, 6, 8, dtype=torch.bool)
OBJECTIVE_ERRORS = [  # of both losses
    (
        "mask",
        torch.ones(2, 6, 8),
        TypeError,
        "mask must be a bool tensor, true .* count, got torch.float32",
    ),
    ("mask", NO_MASK[:, :3], ValueError, r"mask must have shape \[B, \*locations\] = \[2, 6, 8\], got \[2, 3, 8\]"),
    ("mask", NO_MASK.to("meta"), ValueError, "mask must be on the device of model_output, cpu, got meta"),
    (
        "mask",
        NO_MASK & torch.tensor([True, False]).view(2, 1, 1),
        ValueError,
        "mask must keep a location of every sample, got none for sample 1",
    ),
    ("step_weights", torch.ones(3), ValueError, r"step_weights must have shape \[B\] = \[2\], got \[3\]"),
    ("step_weights", 0.5, TypeError, "step_weights must be a float32 tensor, got float"),
    ("reduction", "sum", ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ("old_model_output", LATENT[:1], ValueError, r"old_model_output must have the shape of model_output.*got \[1, 4"),
]
NFT_ERRORS = [
    ("advantages", torch.ones(2, 1), ValueError, r"advantages must have shape \[B\] = \[2\], got \[2, 1\]"),
    ("target", LATENT[:, :2], ValueError, r"target must have the shape of model_output.*got \[2, 2, 6, 8\]"),
    ("sigma", 0.5, TypeError, "sigma must be a float32 tensor, got float"),
    ("sigma", None, TypeError, "sigma must be a float32 tensor, got NoneType"),
    ("sigma", torch.ones(3), ValueError, r"sigma must have shape \[B\] = \[2\], got \[3\]"),
    ("beta", 0.0, ValueError, "beta must be positive and finite, got 0.0"),
    ("beta", NAN, ValueError, "beta must be positive and finite, got nan"),
    ("beta", None, TypeError, "beta must be a number, got None"),
    ("adaptive", "yes", TypeError, "adaptive must be True or False, got 'yes'"),
    ("advantage_clip", INF, ValueError, "advantage_clip must be finite, got inf"),
]
GOOD_NFT = {
    **dict.fromkeys(("model_output", "old_model_output", "target"), LATENT),
    "advantages": ONES,
    "sigma": ONES / 2,
}
SHARED = (
    "model_output",
    "weighted_kl",
    "advantages",
    "weights",
    "advantage_clip",
    "kl_coef",
    "ref_model_output",
    "channel_dim",
    "backend",
)


def ids(rows: list) -> list[str]:
    return [f"{name}-{number}" for number, (name, *_) in enumerate(rows)]


FOR_POLICY = LATENT_ERRORS + LOSS_ERRORS + OBJECTIVE_ERRORS
FOR_NFT = [row for row in LATENT_ERRORS + LOSS_ERRORS if row[0] in SHARED] + OBJECTIVE_ERRORS + NFT_ERRORS


@pytest.mark.parametrize(("name", "value", "error", "message"), FOR_NFT, ids=ids(FOR_NFT))
def test_bad_input_to_the_nft_loss_is_named(name: str, value: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        weighted_nft_loss(**{**GOOD_NFT, name: value})


@pytest.mark.parametrize(("name", "value", "error", "message"), FOR_POLICY, ids=ids(FOR_POLICY))
def test_bad_input_to_the_loss_is_named(name: str, value: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        weighted_policy_loss(**{**GOOD, name: value})


@pytest.mark.parametrize(("name", "value", "error", "message"), LATENT_ERRORS, ids=ids(LATENT_ERRORS))
def test_bad_input_to_sampling_is_named(name: str, value: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        sample_transition(**{"model_output": LATENT, "sample": LATENT, "transition": STEP, name: value})


def test_good_input_is_accepted() -> None:
    weighted_policy_loss(**GOOD)
    weighted_policy_loss(**GOOD, weights=weights(0.0), clip_range=(0.1, 5.0), kl_coef=0.0)
    weighted_nft_loss(**GOOD_NFT)
    sample_transition(LATENT, LATENT, STEP)


def test_a_missing_dimension_is_the_error_of_a_wrong_shape() -> None:
    latent = torch.ones(1, 2, 3, 4, 1)
    flat = latent[0].transpose(0, 1)
    with pytest.raises(ValueError, match=r"sample must have the shape of model_output"):
        weighted_policy_loss(latent, flat, latent, torch.ones(1, 2, 3, 4), torch.ones(1), STEP, channel_dim=4)
    with pytest.raises(ValueError, match=r"advantages must have shape \[B, G\] = \[1, 1\]"):
        weighted_policy_loss(
            *(latent,) * 3,
            torch.ones(1, 2, 3, 4),
            torch.ones(()),
            STEP,
            weights=torch.ones(1, 1, 2, 3, 4),
            channel_dim=4,
        )
    with pytest.raises(ValueError, match=r"sample must have the shape of model_output"):
        sample_transition(latent, flat, STEP, noise=latent, channel_dim=4)


@pytest.mark.parametrize("options", [{"weights": ROWS + 1}, {"ratio": "location"}])
def test_one_old_log_prob_for_each_sample_requires_sample_ratios_without_weights(options: dict) -> None:
    weighted_policy_loss(**{**GOOD, "old_log_prob": ONES})
    with pytest.raises(ValueError, match=r"old_log_prob must have shape .*got \[2\] \(shape \[B\] is accepted only"):
        weighted_policy_loss(**{**GOOD, "old_log_prob": ONES}, **options)


def test_weights_of_a_packed_latent_have_no_coarser_grid() -> None:
    packed = {name: torch.zeros(2, 48, 4) for name in ("model_output", "sample", "prev_sample")}
    with pytest.raises(ValueError, match=r"weights must have shape \[B, \*locations\] = \[2, 48\], got \[2, 12\]"):
        weighted_policy_loss(
            **{**GOOD, **packed, "old_log_prob": torch.zeros(2, 48)}, weights=torch.ones(2, 12), channel_dim=-1
        )


def test_noise_and_generator_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="generator must be None if noise is given"):
        sample_transition(LATENT, LATENT, STEP, noise=LATENT, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"noise must have the shape of model_output.*got \[1, 4, 6, 8\]"):
        sample_transition(LATENT, LATENT, STEP, noise=LATENT[:1])


def test_the_compiled_kernels_do_not_support_float64() -> None:
    wide = {name: GOOD[name].double() for name in ("model_output", "sample", "prev_sample")}
    with pytest.raises(ValueError, match=r"backend 'native' cannot run here: .*float64"):
        weighted_policy_loss(**{**GOOD, **wide}, backend="native")


SIGMA_ERRORS = [
    ({"sigma": 0.0}, "sigma must be above 0 and at most 1, got 0"),
    ({"sigma": 1.2}, "sigma must be above 0 and at most 1, got 1.2"),
    ({"sigma": NAN}, "sigma must be above 0 and at most 1, got nan"),
    ({"sigma": torch.tensor([0.9, -0.1])}, "sigma must be above 0 and at most 1, got -0.1"),
    ({"sigma_next": 0.8}, "sigma_next must be at least 0 and below sigma, got 0.8"),
    ({"sigma_next": -0.1}, "sigma_next must be at least 0 and below sigma, got -0.1"),
    ({"sigma_next": NAN}, "sigma_next must be at least 0 and below sigma, got nan"),
    ({"sigma_next": torch.ones(1, 1) / 2}, r"sigma_next must be a float or have shape .*got \[1, 1\]"),
    ({"sigma": torch.ones(2), "sigma_next": torch.ones(3) / 2}, r"sigma_next must .*\[B\] = \[2\], got \[3\]"),
    ({"sigma": torch.ones(0)}, r"sigma must be a float or have shape .*got \[0\]"),
    ({"sigma": torch.ones(2), "sigma_next": torch.ones(2, device="meta")}, "sigma_next must be on the device of sigma"),
]


@pytest.mark.parametrize(("changed", "message"), SIGMA_ERRORS)
@pytest.mark.parametrize(
    "make", [lambda **k: flow_sde(**k, sigma_max=0.95), flow_cps, dance_sde], ids=["flow_sde", "flow_cps", "dance_sde"]
)
def test_sigmas_out_of_range_are_named(make: Any, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"sigma": 0.8, "sigma_next": 0.6, **changed})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: flow_sde("0.8", 0.6, sigma_max=0.9), "sigma"),
        (lambda: flow_cps(0.8, None), "sigma_next"),
        (lambda: dance_sde(0.8, [[0.6], [0.5, 0.4]]), "sigma_next"),
        (lambda: flow_sde(0.8, 0.6, sigma_max=None), "sigma_max"),
        (lambda: flow_matching(None), "sigma"),
        (lambda: flow_matching(0.5, weight="1"), "weight"),
    ],
)
def test_a_transition_argument_that_is_not_a_number_is_named(call: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a float or a tensor of floats, got"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow_sde(0.8, 0.6, sigma_max=1.0), "sigma_max must lie strictly between 0 and 1, got 1"),
        (lambda: flow_sde(0.8, 0.6, sigma_max=0.0), "sigma_max must lie strictly between 0 and 1, got 0"),
        (lambda: flow_sde(torch.ones(2), 0.6, sigma_max=torch.full((3,), 0.9)), r"sigma_max .*\[3\]"),
        (lambda: flow_sde(0.8, 0.6, sigma_max=torch.full((3,), 0.9)), r"sigma_max .*\[3\]"),
        (lambda: flow_sde(torch.ones(2), 0.6, sigma_max=torch.full((2,), 0.9, device="meta")), "sigma_max .*device"),
        (
            lambda: flow_sde(0.8, 0.6, noise_level=0.0, sigma_max=0.9),
            "noise_level must be positive and finite, got 0.0",
        ),
        (
            lambda: flow_sde(0.8, 0.6, noise_level=INF, sigma_max=0.9),
            "noise_level must be positive and finite, got inf",
        ),
        (lambda: flow_cps(0.8, 0.6, noise_level=0.0), "noise_level must be above 0 and at most 1, got 0.0"),
        (lambda: flow_cps(0.8, 0.6, noise_level=1.1), "noise_level must be above 0 and at most 1, got 1.1"),
        (lambda: dance_sde(0.8, 0.6, eta=-0.3), "eta must be positive and finite, got -0.3"),
        (lambda: flow_matching(0.0), "sigma must be above 0 and at most 1, got 0"),
        (lambda: flow_matching(torch.ones(1, 2)), r"sigma must be a float or have shape .*got \[1, 2\]"),
        (lambda: flow_matching(0.5, weight=0.0), "weight must be positive and finite, got 0"),
        (lambda: flow_matching(torch.ones(2), weight=torch.ones(3)), r"weight must .*\[B\] = \[2\], got \[3\]"),
        (lambda: flow_matching(0.5, weight=torch.ones((), device="meta")), "weight .*device of sigma, cpu, got meta"),
    ],
)
def test_other_options_out_of_range_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", ["high", None, [0.7]], ids=str)
def test_a_noise_level_that_is_not_a_number_is_named(value: Any) -> None:
    for call in (
        lambda: flow_sde(0.8, 0.6, noise_level=value, sigma_max=0.9),
        lambda: flow_cps(0.8, 0.6, noise_level=value),
        lambda: dance_sde(0.8, 0.6, eta=value),
    ):
        with pytest.raises(TypeError, match=r"(noise_level|eta) must be a number, got"):
            call()
