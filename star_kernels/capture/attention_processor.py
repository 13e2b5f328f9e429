"""Attention processors that record maps: the model's own, with one attention call intercepted.

A processor runs unchanged, in a subclass created at run time. One of its calls of ``F.scaled_dot_product_attention``,
or of another attention backend of diffusers' dispatcher, is computed together with its maps. The dispatcher's backend
"native" calls that function.

Replacing the function in ``torch.nn.functional`` is the cheap way to intercept it, and suffices for processors that
call it by that name. The first call of a processor class shows whether it does; until then, and while torch.compile
traces, a TorchFunctionMode intercepts the call as well.
"""

from __future__ import annotations

import operator
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from star_kernels.capture.attention_call import attention_with_maps
from star_kernels.capture.interception import FunctionMode, Interception, traced
from star_kernels.capture.passes import ForwardPass, Passes
from star_kernels.capture.perturbed import register_for_guiders


class CapturedAttention:
    """An attention module, its original processor, and its maps of the latest forward pass."""

    def __init__(
        self, name: str, attention: Any, passes: Passes, detach: bool, output: str = "auto", call: int | None = None
    ) -> None:
        self.name = name
        self.output = output
        self.call = call
        self.attention = attention
        self.processor = attention.processor
        self.recording_processor: Any = None
        self.passes = passes
        self.detach = detach
        self.ran = False  # in the latest forward pass
        self.compiled = False  # the maps are an output of a compiled graph
        self.maps: Tensor | None = None  # [batch, G, R], or [batch, G, H, R]
        other = recorded_by(self.processor)
        if other is not None and other.recording_processor is None:  # left over from a capture that was removed
            self.processor = other.processor
        elif other is not None:
            raise ValueError(
                f"transformer is captured already, at {name}: leave the context or remove the other capture first; "
                "star_kernels.capture.detach_maps(transformer) removes all captures"
            )

    def clear(self) -> None:
        self.ran, self.compiled, self.maps = False, False, None

    def install(self) -> None:
        self.recording_processor = _recording_processor(self.processor, self)
        self.attention.processor = self.recording_processor

    def original_processor(self) -> Any:
        """The original processor, with attributes set during the capture, such as another attention backend."""
        if self.recording_processor is not None:
            attributes = {k: v for k, v in vars(self.recording_processor).items() if k != "_star_attention"}
            vars(self.processor).update(attributes)
        return self.processor

    def remove(self) -> None:
        self.original_processor()
        if self.attention.processor is self.recording_processor:  # not if another processor was set meanwhile
            self.attention.processor = self.processor
        self.recording_processor = None

    def interception(self, forward_pass: ForwardPass) -> Interception:
        return Interception(self.name, partial(self.attend, forward_pass), self.call, forward_pass.keys)

    def attend(
        self, forward_pass: ForwardPass, function: Any, backend: str | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Replaces an attention call in a forward pass, and records the maps if it is still open."""
        if getattr(self.recording_processor, "_parallel_config", None) is not None:
            raise ValueError(
                f"{self.name} uses context parallelism, which is not supported: each device computes a part of the maps"
            )
        recorded = self.passes.is_open(forward_pass)
        if recorded and not self.detach and forward_pass.grad_enabled and not torch.is_grad_enabled():
            raise ValueError(
                f"{self.name} runs without gradients in a forward pass that has them, as under reentrant "
                "checkpointing: its maps would not be differentiable. Use checkpointing with use_reentrant=False, or "
                "capture with detach=True"
            )
        out, maps = attention_with_maps(
            self.name, forward_pass, self.detach, self.output, function, backend, args, kwargs
        )
        if recorded:
            self.maps = maps
        return out


def recorded_by(processor: Any) -> CapturedAttention | None:
    """The captured attention module that a recording processor belongs to; None for any other processor."""
    return vars(processor).get("_star_attention") if hasattr(processor, "__dict__") else None


def _recording_processor(processor: Any, captured: CapturedAttention) -> Any:
    copy = object.__new__(_recording_class(processor.__class__))
    copy.__dict__.update(vars(processor))
    copy.__dict__["_star_attention"] = captured
    return copy


@cache
def _recording_class(processor_class: Any) -> type[Any]:
    original = processor_class.__call__

    @wraps(original)  # attention modules read the keyword arguments that they pass from the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        captured = self._star_attention
        if torch.compiler.is_compiling():
            forward_pass = captured.passes.current
            if forward_pass is None:
                return original(self, *args, **kwargs)
            captured.ran = captured.compiled = True
            interception = traced.interception = captured.interception(forward_pass)
            try:
                with FunctionMode(interception):
                    result = original(self, *args, **kwargs)
            finally:
                traced.interception = None
            interception.check()
            return result
        passes = captured.passes
        forward_pass = passes.in_this_thread()
        is_replica = args and args[0] is not captured.attention and isinstance(args[0], nn.Module)
        if forward_pass is None or is_replica:
            return original(self, *args, **kwargs)
        if passes.is_open(forward_pass):
            captured.ran = True
        else:
            passes.ran_outside(captured.name)
        interception = captured.interception(forward_pass)
        if _calls_by_name.get(processor_class, False):
            with interception:
                result = original(self, *args, **kwargs)
            if not interception.seen:  # from the next call on a mode is used for this class
                _calls_by_name[processor_class] = False
            interception.check()
            return result
        with interception, FunctionMode(interception):
            result = original(self, *args, **kwargs)
        if interception.by_name:
            _calls_by_name.setdefault(processor_class, True)
        interception.check()
        return result

    def reduce(self: Any, protocol: Any) -> Any:  # pickle and deepcopy keep the original processor
        return operator.getitem, ((self._star_attention.original_processor(),), 0)

    members = {"__call__": call, "__reduce_ex__": reduce, "__module__": __name__}
    made = type(processor_class.__name__, (processor_class,), members)
    register_for_guiders(made, processor_class)
    return made


_calls_by_name: dict[type[Any], bool] = {}  # whether a class calls F.scaled_dot_product_attention or the dispatcher
