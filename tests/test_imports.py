"""What an import loads: the compiler of PyTorch alone takes two seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from star_kernels.torch_internals import constant_in_graph

LAZY = {"torch._dynamo", "sympy", "triton", "diffusers", "transformers", "matplotlib", "PIL"}
PROGRAM = "import sys, torch; before = set(sys.modules); import {}; print(*(set(sys.modules) - before))"


@pytest.mark.parametrize("module", ["star_kernels", "star_kernels.prompts", "star_kernels.maps"])
def test_an_import_loads_no_more_than_torch(module: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(module)]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert module in loaded
    assert not LAZY & loaded


def test_constants_of_a_graph_are_marked_as_pytorch_marks_them() -> None:
    def ours() -> bool:
        return True

    def theirs() -> bool:
        return True

    constant_in_graph(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
