"""Runs configurations one after the other on the processes of torchrun, on the CPU by gloo.

``two_processes.py WRAPPER CONFIG.yaml [WRAPPER CONFIG.yaml ...]``, where WRAPPER is ddp or fsdp2.
"""

from __future__ import annotations

import sys

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from star_trainer.command import parse
from star_trainer.trainer import Trainer


def accelerator(sharded: bool) -> Accelerator:
    made = Accelerator(cpu=True)
    assert made.num_processes == 2
    if sharded:  # accelerate offers FSDP for accelerators alone; PyTorch's own code has no such limit
        state = AcceleratorState()
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
        )
        assert made.is_fsdp2
    return made


if __name__ == "__main__":
    for wrapper, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        Trainer(parse(["--config", path]), accelerator(wrapper == "fsdp2"), progress=False).run()
