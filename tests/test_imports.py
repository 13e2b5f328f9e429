"""What an import loads: the compiler of PyTorch alone takes two seconds."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch

import star_kernels
from star_kernels.torch_internals import constant_in_graph

LAZY = {"torch._dynamo", "sympy", "triton", "diffusers", "transformers", "matplotlib", "PIL"}
PROGRAM = "import sys, torch; before = set(sys.modules); import {}; print(*(set(sys.modules) - before))"


@pytest.mark.parametrize("module", ["star_kernels", "star_kernels.prompts", "star_kernels.maps"])
def test_an_import_loads_no_more_than_torch(module: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(module)]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert module in loaded
    assert not LAZY & loaded


def test_a_name_of_the_top_level_is_loaded_when_it_is_used() -> None:
    pytest.importorskip("diffusers")
    program = (
        "import sys, star_kernels as sk; names = dir(sk); assert 'star_kernels.capture' not in sys.modules;"
        "import star_kernels.capture as c, star_kernels.prompts as p;"
        "assert (sk.attach_maps, sk.capture_maps) == (c.attach_maps, c.capture_maps);"
        "assert sk.select_tokens is p.select_tokens;"
        "assert {*sk.__all__, 'maps', 'pipelines'} <= {*names}; print(sk.__version__, sk.maps.draw.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert found == [metadata.version("star-kernels"), "draw"]


def test_an_unknown_name_of_the_top_level_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'star_kernels' has no attribute 'capture_map'"):
        star_kernels.capture_map  # noqa: B018


def test_constants_of_a_graph_are_marked_as_pytorch_marks_them() -> None:
    def ours() -> bool:
        return True

    def theirs() -> bool:
        return True

    constant_in_graph(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
