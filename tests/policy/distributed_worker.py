"""One of two processes that share a batch: python distributed_worker.py RANK FILE ddp|fsdp

Both hold a model in the wrapper named, each takes half of a batch, and the first writes the whole gradients to FILE.pt.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from star_kernels import PolicyLoss, flow_sde, sample_transition, weighted_policy_loss

BATCH = 4


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1))


def loss_of(network: nn.Module, chosen: slice) -> PolicyLoss:
    generator = torch.Generator().manual_seed(1)
    sample, noise = (torch.randn(BATCH, 4, 16, 16, generator=generator)[chosen] for _ in range(2))
    advantages = torch.randn(BATCH, generator=generator)[chosen]
    weights = torch.rand(BATCH, 8, 8, generator=generator)[chosen]
    transition = flow_sde(0.8, 0.7, sigma_max=0.9)
    prev_sample, old_log_prob = sample_transition(sample * 0.1, sample, transition, noise=noise)
    return weighted_policy_loss(
        network(sample), sample, prev_sample, old_log_prob, advantages, transition, weights=weights, clip_range=0.9
    )


def main(rank: int, file: str, wrapper: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    network: nn.Module = model()
    if wrapper == "ddp":
        network = nn.parallel.DistributedDataParallel(network)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (network[0], network[2], network):
            fully_shard(layer, mesh=mesh)
    share = BATCH // 2
    loss_of(network, slice(rank * share, (rank + 1) * share)).backward()
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in network.parameters()]
    if rank == 0:
        torch.save(gradients, f"{file}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
