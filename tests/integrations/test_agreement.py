"""Log-probabilities are compared: the mean and largest difference, and whether they are those of a sampler."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from flow_grpo_formulas import rollout

from star_kernels.integrations.agreement import log_prob_agreement
from star_kernels.integrations.sampler_check import SamplerCheck


def test_the_mean_and_the_largest_difference_by_step() -> None:
    log_prob = torch.zeros(2, 3, 4, 5, requires_grad=True)
    other = torch.zeros(2, 3, 4, 5)
    other[1, 2, 3, 4], other[0, 1] = -8.0, 0.5
    found = log_prob_agreement(log_prob, other, by_step=True)
    assert found.mean.tolist() == pytest.approx([0, 0.25, 0.2])
    assert found.max.tolist() == [0, 0.5, 8]
    assert not found.mean.requires_grad
    metrics = found.metrics("diff")
    assert len(metrics) == 6
    assert float(metrics["diff/step_2/max"]) == 8
    whole = log_prob_agreement(log_prob, other).metrics("diff")
    assert float(whole["diff/mean"]) == pytest.approx(0.15)
    assert float(whole["diff/max"]) == 8
    with pytest.raises(ValueError, match=r"other must have the shape of log_prob, \[2, 3, 4, 5\], got \[2\]"):
        log_prob_agreement(log_prob, torch.zeros(2))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_log_probabilities_of_the_sampler_pass(sde_type: str, normalised: bool) -> None:
    old = rollout("sd3", sde_type).old
    log_prob = old.log_prob_mean
    if not normalised and sde_type == "sde":
        std = (old.std_dev_t * old.sqrt_dt).flatten()
        log_prob = log_prob + torch.log(std) + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    check = SamplerCheck()
    arguments = (old.mean, old.prev_sample, old.std_dev_t, old.sqrt_dt)
    check.add(log_prob, *arguments, sde_type=sde_type)
    check.add(log_prob * torch.nan, *arguments, sde_type=sde_type)  # a diverged model is the trainer's to report
    with pytest.raises(ValueError, match="of none of sde, cps, dance_sde, or were computed for another latent"):
        check.add(log_prob * 1.01, *arguments, sde_type=sde_type)
    check.settle()  # an error is raised once


def test_a_sample_without_noise_hides_no_other() -> None:
    old = rollout("sd3", "cps").old
    mean, scale, log_prob = old.mean.clone(), old.std_dev_t.clone(), old.log_prob_mean.clone()
    mean[0], scale[0], log_prob[0] = old.prev_sample[0], 0, 0
    check = SamplerCheck()
    check.add(log_prob, mean, old.prev_sample, scale, old.sqrt_dt, sde_type="cps")
    with pytest.raises(ValueError, match="sde_type must be the sampler of log_probs, got 'sde'"):
        check.add(log_prob, mean, old.prev_sample, scale, old.sqrt_dt, sde_type="sde")
