"""The network is only used if a hub id or an address is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import mostly_exhaustive

# Seen by the interpreter itself, at import and in threads too, and not to be caught as an error.
WATCH = """
import os, sys

def watch(event, arguments):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}:
        os.write(2, f"ASKED THE NETWORK: {event} {arguments}\\n".encode())
        os._exit(9)

sys.addaudithook(watch)
"""
LIBRARY = """
import torch, star_kernels
from star_kernels import TokenSelection, allocate, attention, flow_sde, sample_transition, weighted_policy_loss
import star_kernels.capture, star_kernels.figures, star_kernels.integrations, star_kernels.maps, star_kernels.prompts
from star_kernels.__main__ import main

main([])
q, k, v = torch.randn(3, 1, 2, 16, 8).unbind()
maps = attention(q, k, v, TokenSelection.from_positions([[1, 2]]), rows=slice(0, 16)).maps
step = flow_sde(torch.tensor([0.9]), torch.tensor([0.8]), sigma_max=0.95)
velocity, latents = torch.randn(2, 1, 4, 4, 4)
following, old = sample_transition(velocity, latents, step)
weights = allocate(maps[:, 0]).view(1, 4, 4)
weighted_policy_loss(velocity, latents, following, old, torch.ones(1), step, weights=weights)
"""
DRIVER = """
from star_trainer import command

status = command.main([
    "--output.folder", sys.argv[1], "--train.epochs", "1", "--rollout.groups", "2", "--rollout.group_size", "2",
    "--evaluation.prompts", "2", "--evaluation.steps", "2",
])
raise SystemExit(status)
"""
PROBE = """
import socket

try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    pass
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the code in a process that is not set to offline mode, with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", WATCH + script, str(folder / "run")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", mostly_exhaustive([LIBRARY, DRIVER], [LIBRARY]), ids=["star_kernels", "star-train"])
def test_no_network_connection_is_made(script: str, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_check_detects_a_connection(tmp_path: Path) -> None:
    done = run(PROBE, tmp_path)
    assert done.returncode == 9
    assert "ASKED THE NETWORK" in done.stderr
