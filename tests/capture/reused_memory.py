"""A backend of torch.compile whose outputs are in memory that the next call overwrites, like those of CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func


class ReusedMemory:
    """The backend, and what it has compiled.

    Attributes:
        mutating: operators of the compiled graphs that write to inputs. CUDA graphs are skipped for such graphs.
        unsafe: operators that CUDA graphs must not contain.
    """

    def __init__(self) -> None:
        self.mutating: list[str] = []
        self.unsafe: list[str] = []
        self._graphs: list[_Replayed] = []
        self.backend = aot_autograd(fw_compiler=self._compile, bw_compiler=self._compile)

    def overwrite(self) -> None:
        """Overwrites the outputs of all graphs, as their next replay does."""
        for graph in self._graphs:
            graph.overwrite()

    def _compile(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        for node in calls:
            if isinstance(node.target, torch._ops.OpOverload):
                if node.target.namespace == "aten" and node.target._schema.is_mutable:
                    self.mutating.append(str(node.target))
                if torch.Tag.cudagraph_unsafe in node.target.tags:
                    self.unsafe.append(str(node.target))
        graph = _Replayed(module)
        self._graphs.append(graph)
        return make_boxed_func(graph)


class _Replayed:
    """A graph that copies its outputs to the memory of its first outputs, which is overwritten before each call."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.memory: dict[int, Tensor] = {}

    def overwrite(self) -> None:
        for tensor in self.memory.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> list[Any]:
        self.overwrite()
        own = {value.untyped_storage().data_ptr() for value in inputs if isinstance(value, Tensor)}
        outputs = list(self.module(*inputs))
        for number, output in enumerate(outputs):
            if isinstance(output, Tensor) and output.untyped_storage().data_ptr() not in own:
                if number not in self.memory:
                    self.memory[number] = torch.empty_strided(output.size(), output.stride(), dtype=output.dtype)
                outputs[number] = self.memory[number].copy_(output).detach()
        return outputs
