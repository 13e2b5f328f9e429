"""The memory of a case: inputs with random layouts between guards, and outputs that detect unwritten elements."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from star_kernels import native

GUARD = 67  # elements before and after a buffer
UNWRITTEN = {4: (torch.int32, 0x7FA5A5A5), 2: (torch.int16, 0x7FA5)}  # size of an element -> its bits until written
OUTPUTS = {  # number of outputs, the last arguments but for None and flags, of each function of the compiled library
    "policy_forward": 4,
    "policy_backward": 2,
    "nft_forward": 4,
    "nft_backward": 2,
    "sample_transition": 2,
    "attention_maps": 1,
    "masked_attention_maps": 1,
    "attention_rows": 2,
    "attention_columns": 1,
}


class Draw(random.Random):
    """The random choices of one case."""

    def __init__(self, seed: int, operation: str, number: int) -> None:
        super().__init__(f"{seed} {operation} {number}")
        self.generator = torch.Generator().manual_seed(self.getrandbits(62))
        self.placed: list[tuple[str, Tensor, Tensor]] = []

    def chance(self, share: float) -> bool:
        return self.random() < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform_tensor(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def size(self, most: int) -> int:
        return self.choice([1, 2, 3, self.randint(1, most), self.randint(1, most)])

    def place(self, name: str, values: Tensor, *, expands: bool = True) -> Tensor:
        """A view of guarded memory with these values and a random layout. Some dimensions may be expanded."""
        if values.ndim == 0 or self.chance(0.25):
            order, steps, pads = list(range(values.ndim))[::-1], 1, [0] * values.ndim
        else:
            order = self.sample(range(values.ndim), values.ndim)
            steps, pads = self.choice([1, 1, 2, 3]), [self.choice([0, 0, 1, 3]) for _ in order]
        repeated = {d for d in range(values.ndim) if expands and values.ndim > 1 and self.chance(0.06)}
        strides, extent = [0] * values.ndim, steps
        for d in order:
            if d not in repeated:
                strides[d] = extent
                extent *= values.shape[d] + pads[d]
        offset = GUARD + self.randint(0, 5)
        storage = filled(values.dtype, extent + offset + GUARD)
        view = storage.as_strided(values.shape, strides, offset)
        one = tuple(slice(0, 1) if d in repeated else slice(None) for d in range(values.ndim))
        view[one] = values[one]
        self.placed.append((name, storage, storage.clone()))
        return view

    def check_inputs(self) -> None:
        for name, storage, before in self.placed:
            assert torch.equal(storage.view(torch.uint8), before.view(torch.uint8)), f"the memory of {name} has changed"


def filled(dtype: torch.dtype, elements: int) -> Tensor:
    """Memory filled with NaN, or for integers with a number that no result has."""
    if dtype == torch.bool:
        return torch.ones(elements, dtype=dtype)
    integer, pattern = UNWRITTEN.get(dtype.itemsize, (torch.int64, 0x7FF5A5A5A5A5A5A5))
    return torch.full((elements,), pattern, dtype=integer).view(dtype)


class Frame:
    """Guarded memory for an output, with the strides of the output and filled with the unwritten pattern."""

    def __init__(self, name: str, output: Tensor) -> None:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(output.shape, output.stride(), strict=True))
        self.name, self.output = name, output
        self.storage = filled(output.dtype, extent + 2 * GUARD)
        self.tensor = self.storage.as_strided(output.shape, output.stride(), GUARD)

    def close(self) -> None:
        """Checks that exactly the elements of the output were written, and copies them to the output."""
        integer, pattern = UNWRITTEN[self.output.dtype.itemsize]
        untouched = self.storage.view(integer) == pattern
        inside = torch.zeros_like(untouched)
        inside.as_strided(self.tensor.shape, self.tensor.stride(), GUARD).fill_(True)
        assert bool(untouched[~inside].all()), f"{self.name} was written outside its elements"
        assert not bool(untouched[inside].any()), f"some elements of {self.name} were left unwritten"
        self.output.copy_(self.tensor)


@contextmanager
def guarded_library() -> Iterator[None]:
    """Makes the functions of the compiled library write to frames, which check what was written."""
    library = native.cpu()
    if library is None:
        yield
        return

    def framed(function: str) -> Callable[..., None]:
        compiled, outputs = getattr(library, function), OUTPUTS[function]

        def call(*arguments: Any) -> None:
            frames = {
                i: Frame(f"output {i} of {function}", a)
                for i, a in enumerate(arguments[-outputs:], len(arguments) - outputs)
                if isinstance(a, Tensor)
            }
            compiled(*(frames[i].tensor if i in frames else a for i, a in enumerate(arguments)))
            for frame in frames.values():
                frame.close()

        return call

    functions = {**vars(library), **{function: framed(function) for function in OUTPUTS}}
    with mock.patch.object(native, "cpu", return_value=SimpleNamespace(**functions)):
        yield
