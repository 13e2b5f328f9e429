"""Runs a configuration on the processes of torchrun: ``two_processes.py CONFIG.yaml [fsdp2]``, on the CPU by gloo."""

from __future__ import annotations

import sys

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
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
    Trainer(parse(["--config", sys.argv[1]]), accelerator("fsdp2" in sys.argv), progress=False).run()
