"""How an attention call inside a diffusers processor is answered by star_kernels.

The processor runs unchanged, in a subclass made on the fly. Its first ``F.scaled_dot_product_attention`` is answered by
:func:`star_kernels.attention`. Processors that go through diffusers' dispatcher reach that function too, as long as the
native backend is set.

While a processor runs, ``F.scaled_dot_product_attention`` is one that looks up what its thread captures. A mode that
sees every call of PyTorch's functions needs no exchange, but costs some microseconds for each of the seventy calls of
a block; it serves graphs as they are traced, processors that hold the function by a name of their own, and the first
call of a class of processors, which shows whether it does.
"""

from __future__ import annotations

import operator
import threading
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from star_kernels.attention import attention
from star_kernels.capture.passes import Pass, Passes
from star_kernels.capture.transforms import backend_for

MASKED = -1e3  # an additive mask holds 0, or at most this: far below it a softmax in float32 has nothing left


class Block:
    """One attention module, its own processor, and the maps it gave in the latest forward pass."""

    def __init__(self, name: str, attention: Any, passes: Passes, detach: bool) -> None:
        self.name = name
        self.attention = attention
        self.processor = attention.processor
        self.capturing: Any = None
        self.passes = passes
        self.detach = detach
        self.ran = False  # in the latest pass
        self.maps: Tensor | None = None  # [batch, G, R]
        other = captured_by(self.processor)
        if other is not None and other.capturing is None:  # of a capture that is over, put back by whoever kept it
            self.processor = other.processor
        elif other is not None:
            raise ValueError(
                f"transformer is captured already, at {name}: leave the context or remove the other capture first; "
                "star_kernels.capture.detach_maps(transformer) removes every one"
            )

    def forget(self) -> None:
        self.ran, self.maps = False, None

    def install(self) -> None:
        self.capturing = _capturing(self.processor, self)
        self.attention.processor = self.capturing

    def plain(self) -> Any:
        """Its own processor, with what was set meanwhile, such as another attention backend."""
        if self.capturing is not None:
            vars(self.processor).update({k: v for k, v in vars(self.capturing).items() if k != "_star_block"})
        return self.processor

    def remove(self) -> None:
        self.plain()
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
        if torch.compiler.is_compiling():
            current = block.passes.current
            if current is None:
                return original(self, *args, **kwargs)
            block.ran = True
            with _Mode(_Question(block, current)):
                return original(self, *args, **kwargs)
        current = block.passes.of_this_thread()
        if current is None or (args and isinstance(args[0], nn.Module) and args[0] is not block.attention):  # a replica
            return original(self, *args, **kwargs)
        if block.passes.takes(current):
            block.ran = True
        question = _Question(block, current)
        if _by_its_name.get(processor_class, False):
            with _Exchange(question):
                result = original(self, *args, **kwargs)
            if not question.answered:  # from now on a mode watches the class
                _by_its_name[processor_class] = False
            return result
        with _Exchange(question) as exchange, _Mode(question):
            result = original(self, *args, **kwargs)
        if exchange.reached:
            _by_its_name.setdefault(processor_class, True)
        return result

    def reduce(self: Any, protocol: Any) -> Any:  # a copy of the model, saved or for an average of weights, is plain
        return operator.getitem, ((self._star_block.plain(),), 0)

    members = {"__call__": call, "__reduce_ex__": reduce, "__module__": __name__}
    return type(processor_class.__name__, (processor_class,), members)


_by_its_name: dict[type[Any], bool] = {}  # processor classes that call F.scaled_dot_product_attention by that name
_thread = threading.local()
_lock = threading.Lock()
_exchanges = 0  # how many run, in all threads
_pytorch: Any = None  # F.scaled_dot_product_attention before the first of them
_BUILTIN = F.scaled_dot_product_attention  # what a mode is shown


class _Question:
    """A run of a processor, whose first attention call is answered; later ones (adapters of image prompts) pass."""

    def __init__(self, block: Block, current: Pass) -> None:
        self.block = block
        self.current = current
        self.answered = False

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        self.answered = True
        return _answer(self.block, self.current, *args, **kwargs)


class _Exchange:
    """Answers where the thread calls ``F.scaled_dot_product_attention``."""

    def __init__(self, question: _Question) -> None:
        self.question = question
        self.reached = False
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
    if exchange is None or exchange.question.answered:
        return _pytorch(*args, **kwargs)
    exchange.reached = True
    return exchange.question.answer(*args, **kwargs)


class _Mode(TorchFunctionMode):
    """Answers whatever name the function is called by."""

    def __init__(self, question: _Question) -> None:
        super().__init__()
        self.question = question

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # torch.compile cannot trace it as a function, only as a method
            return args[0].unflatten(*args[1:], **kwargs)
        if self.question.answered or func is not _BUILTIN:
            return func(*args, **kwargs)
        return self.question.answer(*args, **kwargs)


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
    taken = block.passes.takes(current)
    if taken and not block.detach and current.gradients and not torch.is_grad_enabled():
        raise ValueError(
            f"{block.name} runs without gradients inside a pass with them, as reentrant checkpointing does: its maps "
            "would not be differentiable. Checkpoint with use_reentrant=False, or capture with detach=True"
        )
    out, maps, _ = attention(
        query,
        key,
        value,
        current.selection,
        rows=current.rows,
        key_mask=key_mask,
        scale=scale,
        backend=backend_for(block.name, query, key, value),
    )
    if taken:
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
            f"the transformer must be called with a batch of {batch}{current.expected}, got {query.shape[0]}"
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
