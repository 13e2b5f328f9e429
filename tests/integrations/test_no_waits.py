"""Neither the step nor the loss reads a value of a tensor on the host, so they cause no host sync."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")

from flow_grpo_formulas import rollout, scheduler

from star_kernels.integrations.flow_grpo import policy_loss, sde_step_with_logprob

HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")


class NoHostReads(TorchDispatchMode):
    """Raises if the host reads a value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in HOST_READS:
            raise AssertionError(f"the host reads a value: {func.name()}")
        return func(*args, **(kwargs or {}))


def loop(made: Any, device: str = "cpu", backend: str = "auto") -> None:
    """A rollout and an update of all trained steps of a schedule, with both samplers, with and without weights."""
    x = torch.randn(2, 4, 8, 8, device=device)
    v = torch.randn(2, 4, 8, 8, device=device)
    advantages, weights = torch.randn(2, device=device), torch.ones(2, 4, 4, device=device)
    for sde_type in ("sde", "cps"):
        for i in range(len(made.timesteps) - 1):
            timestep = made.timesteps[i : i + 1].expand(2)
            step = (timestep, x)
            drawn, log_prob, mean, _, _ = sde_step_with_logprob(
                made, v, *step, sde_type=sde_type, return_sqrt_dt=True, dense_log_prob=True, backend=backend
            )
            leaf = (v + 0.01).requires_grad_()
            sde_step_with_logprob(made, leaf, *step, prev_sample=drawn, sde_type=sde_type)[1].sum().backward()
            for chosen in (None, weights):
                loss, metrics = policy_loss(
                    made, leaf, *step, drawn, log_prob, advantages, sde_type=sde_type, weights=chosen, beta=0.1,
                    ref_model_output=v, old_prev_sample_mean=mean, backend=backend,
                )  # fmt: skip
                loss.backward()
                assert isinstance(metrics["approx_kl"], Tensor)
            x = drawn


def test_the_loop_reads_no_value() -> None:
    made = scheduler()
    loop(made)  # computes the coefficients of the schedule, which are checked once on a CPU
    with NoHostReads():
        loop(made)


def test_the_coefficients_of_the_schedule_are_not_read_on_a_device() -> None:
    made = scheduler()
    made.timesteps, made.sigmas = made.timesteps.to("meta"), made.sigmas.to("meta")  # tensors without values
    loop(made, "meta", "naive")


def test_no_host_reads_detects_reads() -> None:
    made = scheduler()
    for read in (
        lambda: made.timesteps[0].item(),
        lambda: bool(made.timesteps[0] > 0),
        lambda: made.index_for_timestep(made.timesteps[1]),
    ):
        with NoHostReads(), pytest.raises(AssertionError, match="reads a value"):
            read()
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="meta").item()


def test_flow_grpos_own_step_reads_values() -> None:
    problem = rollout()
    with NoHostReads(), pytest.raises(AssertionError, match="reads a value"):
        problem.written(problem.new_v)
