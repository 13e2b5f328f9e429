"""How an attention call inside a diffusers processor is answered by star_kernels.

The processor runs unchanged, in a subclass made on the fly. Its first ``F.scaled_dot_product_attention`` is answered by
:func:`star_kernels.attention`. Processors that go through diffusers' dispatcher reach that function too, as long as the
native backend is set.

While a processor runs, ``F.scaled_dot_product_attention`` is one that looks up what its thread captures. A mode that
sees every call of PyTorch's functions needs no exchange, but costs some microseconds for each of the seventy calls of
a block; it serves graphs as they are traced, and processors that hold the function by a name of their own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from star_kernels.attention import attention
from star_kernels.selection import TokenSelection

MASKED = -1e3  # an additive mask holds 0, or at most this: far below it a softmax in float32 has nothing left


@dataclass(frozen=True)
class Pass:
    """What one forward pass captures."""

    selection: TokenSelection  # for every sample of the batch
    halves: str  # how the batch must relate to the user's selection, for the error
    rows: tuple[int, int] | None


class Passes:
    """The running forward pass, shared by the blocks."""

    def __init__(self) -> None:
        self.current: Pass | None = None  # stays after the pass, for a checkpointed block that is computed again
        self.open = False  # maps are taken; not so when a block is computed again


class Block:
    """One attention module, its own processor, and the maps it gave in the latest forward pass."""

    def __init__(self, name: str, attention: Any, passes: Passes, detach: bool) -> None:
        self.name = name
        self.attention = attention
        self.processor = attention.processor
        self.capturing: Any = None
        self.passes = passes
        self.detach = detach
        self.maps: Tensor | None = None  # [batch, G, R]
        if captured_by(self.processor) is not None:
            raise ValueError(f"transformer is captured already, at {name}: leave the context or remove the other first")

    def install(self) -> None:
        self.capturing = _capturing(self.processor, self)
        self.attention.processor = self.capturing

    def remove(self) -> None:
        changed = {k: v for k, v in vars(self.capturing).items() if k != "_star_block"}
        vars(self.processor).update(changed)  # such as another attention backend, set meanwhile
        if self.attention.processor is self.capturing:  # else it was exchanged meanwhile
            self.attention.processor = self.processor
        self.capturing = None


def captured_by(processor: Any) -> Block | None:
    return vars(processor).get("_star_block") if hasattr(processor, "__dict__") else None


def _capturing(processor: Any, block: Block) -> Any:
    """A copy of the processor, in its capturing class."""
    copy = object.__new__(_capturing_class(processor.__class__))
    copy.__dict__.update(vars(processor))
    copy.__dict__["_star_block"] = block
    return copy


@cache
def _capturing_class(processor_class: Any) -> type[Any]:
    original = processor_class.__call__

    @wraps(original)  # attention modules pass on the keyword arguments that they find in the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = self._star_block
        current = block.passes.current
        if current is None:
            return original(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            with _Mode(block, current):
                return original(self, *args, **kwargs)
        if processor_class not in _own_names:
            with _Exchange(block, current) as exchange:
                result = original(self, *args, **kwargs)
            if exchange.answered:
                return result
        with _Mode(block, current) as mode:
            result = original(self, *args, **kwargs)
        if mode.answered:
            _own_names.add(processor_class)
        return result

    def reduce(self: Any, protocol: Any) -> Any:  # a copy of the model, as for an average of its weights, is plain
        return self._star_block.processor.__reduce_ex__(protocol)

    members = {"__call__": call, "__reduce_ex__": reduce, "__module__": __name__}
    return type(processor_class.__name__, (processor_class,), members)


_own_names: set[type[Any]] = set()  # processor classes that do not call F.scaled_dot_product_attention by that name
_thread = threading.local()
_lock = threading.Lock()
_exchanges = 0  # how many run, in all threads
_pytorch: Any = None  # F.scaled_dot_product_attention before the first of them


class _Exchange:
    """Answers the thread's first ``F.scaled_dot_product_attention``; later ones (adapters of image prompts) pass."""

    def __init__(self, block: Block, current: Pass) -> None:
        self.block = block
        self.current = current
        self.answered = False
        self.outer: _Exchange | None = None

    def __enter__(self) -> _Exchange:
        global _exchanges, _pytorch
        self.outer, _thread.exchange = getattr(_thread, "exchange", None), self
        with _lock:
            if not _exchanges:
                _pytorch, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _answer_or_pass
            _exchanges += 1
        return self

    def __exit__(self, *exception: object) -> None:
        global _exchanges
        _thread.exchange = self.outer
        with _lock:
            _exchanges -= 1
            if not _exchanges:
                F.scaled_dot_product_attention = _pytorch


def _answer_or_pass(*args: Any, **kwargs: Any) -> Any:
    exchange = getattr(_thread, "exchange", None)
    if exchange is None or exchange.answered:
        return _pytorch(*args, **kwargs)
    exchange.answered = True
    return _answer(exchange.block, exchange.current, *args, **kwargs)


class _Mode(TorchFunctionMode):
    """The same without an exchange."""

    def __init__(self, block: Block, current: Pass) -> None:
        super().__init__()
        self.block = block
        self.current = current
        self.answered = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # torch.compile cannot trace it as a function, only as a method
            return args[0].unflatten(*args[1:], **kwargs)
        if self.answered or func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.answered = True
        return _answer(self.block, self.current, *args, **kwargs)


def _answer(
    block: Block,
    current: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    _check(block, current, query, dropout_p, is_causal)
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    key_mask = None if attn_mask is None else _key_mask(block, attn_mask, query.shape[0], key.shape[2])
    out, maps, _ = attention(query, key, value, current.selection, rows=current.rows, key_mask=key_mask, scale=scale)
    if block.passes.open:
        block.maps = maps.detach() if block.detach else maps
    return out


def _check(block: Block, current: Pass, query: Tensor, dropout_p: float, is_causal: bool) -> None:
    if dropout_p or is_causal:
        raise ValueError(f"{block.name} attends with dropout_p={dropout_p}, is_causal={is_causal}: neither has maps")
    if getattr(block.capturing, "_parallel_config", None) is not None:
        raise ValueError(f"{block.name} attends in parallel over devices: each would have a part of the maps only")
    batch = current.selection.batch
    if query.shape[0] != batch:
        raise ValueError(
            f"the transformer must be called with a batch of {batch}{current.halves}, got {query.shape[0]}"
        )
    if current.rows is not None and sum(current.rows) > query.shape[2]:
        raise ValueError(
            f"{block.name} attends over {query.shape[2]} positions, which do not hold the image rows "
            f"{current.rows[0]} to {sum(current.rows) - 1}: choose other rows, or blocks without it"
        )


def _key_mask(block: Block, mask: Tensor, batch: int, keys: int) -> Tensor:
    """The mask of an attention call as bool [B, Sk], if it is the same for all heads and queries."""
    given = list(mask.shape)
    if mask.ndim == 2:
        mask = mask[:, None, None]
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] != 1 or mask.shape[3] != keys:
        raise ValueError(
            f"{block.name} attends with a mask of shape {given}; maps need one that is the same for all queries, "
            f"[B, 1, 1, Sk] or [B, Sk] with B = {batch}, Sk = {keys}"
        )
    shared = mask[:, 0, 0]  # [B, Sk]
    if mask.shape[1] > 1:
        _must(mask[:, :, 0] == shared[:, None], f"{block.name} attends with a mask that differs between heads")
    if mask.dtype != torch.bool:
        kept = shared == 0
        good = (kept | (shared <= MASKED)) & kept.any(dim=-1, keepdim=True)
        _must(good, f"{block.name} attends with a bias: an additive mask must hold 0 or -inf, and 0 somewhere")
        shared = kept
    return shared.expand(batch, keys)


def _must(condition: Tensor, message: str) -> None:
    """Raises on the CPU; elsewhere, and in a compiled graph, the device asserts, for no wait."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(condition.all()):
            raise ValueError(message)
    else:
        torch._assert_async(condition.all(), message)
