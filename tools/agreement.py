"""What another dtype, attention kernel or batch size costs in agreement of rollout and training.

``python -m tools.agreement`` rolls out the small model and computes the log-probabilities of the same latents again
with the same weights. It prints the mean and the largest difference over all steps, of locations and of samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from star_kernels.integrations.agreement import log_prob_agreement
from star_kernels.integrations.flow_grpo_policy import log_prob_of, mean_of
from star_trainer.command import parse
from star_trainer.rollout import roll_out
from star_trainer.samples import Batch
from star_trainer.trainer import Trainer

SAMPLES = 16
CASES = {  # contexts of the rollout and of training, and samples in a pass of training
    "float32, the same": ("", "", SAMPLES),
    "float32, 2 samples in a pass": ("", "", 2),
    "float32, another attention kernel": ("", "math", SAMPLES),
    "bf16, the same": ("bf16", "bf16", SAMPLES),
    "bf16, 2 samples in a pass": ("bf16", "bf16", 2),
    "bf16, another attention kernel": ("bf16", "bf16 math", SAMPLES),
    "rollout in float32, training in bf16": ("", "bf16", SAMPLES),
}


@contextmanager
def context(names: str) -> Iterator[None]:
    """Autocast to bf16, and PyTorch's attention without a fused kernel."""
    with ExitStack() as stack:
        if "bf16" in names:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if "math" in names:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@torch.no_grad()
def differences(trainer: Trainer, batch: Batch, names: str, count: int) -> tuple[Any, Any]:
    """The agreement of the locations and of the samples over all steps."""
    found, policy, schedule = [], trainer.policy, trainer.updater.schedule
    for step in batch.steps:
        timestep = schedule.timestep(step.number)
        with context(names):
            parts = [
                policy.velocity(step.sample[i : i + count], timestep, batch.text[i : i + count])
                for i in range(0, SAMPLES, count)
            ]
        transition = schedule.transition(step.number, trainer.config, SAMPLES, policy.device)
        mean = mean_of(torch.cat(parts).float(), step.sample, transition)
        found.append((log_prob_of(mean, step.prev_sample, transition, 1), step.log_prob))
    new, old = (torch.stack(values, dim=1) for values in zip(*found, strict=True))
    return log_prob_agreement(new, old), log_prob_agreement(new.mean(dim=(2, 3)), old.mean(dim=(2, 3)))


def main() -> None:
    """Prints a line for each case."""
    with tempfile.TemporaryDirectory() as folder:
        config = parse(["--output.folder", f"{folder}/run", "--rollout.window", "7", "--rollout.window_end", "7"])
        trainer = Trainer(config)
        prompts = trainer.prompts[:SAMPLES]
        for name, (rollout, training, count) in CASES.items():
            batch = roll_out(trainer.policy, prompts, range(SAMPLES), config, 0, lambda names=rollout: context(names))
            each, whole = differences(trainer, batch, training, count)
            values = " ".join(f"{float(value):8.1e}" for value in (*each, *whole))
            print(f"{name:40} {values}")


if __name__ == "__main__":
    main()
