"""The handle of a capture: maps of the latest captured forward pass of a model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from star_kernels.capture import backends, guidance, registry
from star_kernels.capture.attention_processor import CapturedAttention
from star_kernels.capture.averages import mean_maps
from star_kernels.capture.checkpointing import Checkpointing
from star_kernels.capture.family import Family, ImageTokens
from star_kernels.capture.given_tokens import GivenTokens
from star_kernels.capture.hooks import Hook
from star_kernels.capture.missing_maps import explain
from star_kernels.capture.passes import ForwardPass, Passes
from star_kernels.capture.perturbed import Perturbations, skipping_hooks
from star_kernels.checks import check_flag
from star_kernels.selection import TokenSelection, no_selection


class MapCapture:
    """Attention maps of every forward pass of a model: the mean over the chosen blocks and their heads.

    Returned by :func:`star_kernels.capture.attach_maps`. It is a context manager; leaving the context removes the
    capture. A capture records one thread at a time: beginning a pass while another thread's is running is an error,
    and so is reading maps that another thread's pass has replaced.

    Attributes:
        enabled: if False, forward passes are not captured (for example those of the unconditional branch or of a
            reference model) and the maps of the latest captured pass are kept.
        blocks: the indices of the captured blocks. They cannot be changed: attach another capture.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        attentions: dict[str, Any],
        *,
        blocks: Sequence[int],
        overrides: dict[str, Any],
        cfg: str | None,
        detach: bool,
        output: str = "auto",
        call: int | None = None,
    ) -> None:
        self._enabled, self._blocks = True, tuple(blocks)
        self._removed = False
        self._model, self._family = model, family
        self._guidance = guidance.Guidance(cfg, family.cfg)
        self._given = GivenTokens(overrides)
        self._passes = Passes()
        self._detach = detach
        self._lock = threading.RLock()
        self._modules = [
            CapturedAttention(
                name, module, self._passes, detach, output, family.call_of(module) if call is None else call
            )
            for name, module in attentions.items()
        ]
        self._checkpointing = Checkpointing(model, self._passes, self._modules)
        self._perturbations = Perturbations(model)
        self._skipped = ""  # why the latest pass was not captured
        self._forward: Any = None  # the model's forward method
        self._signature = inspect.Signature()  # of that method
        self._value: Tensor | None = None
        self._image: ImageTokens | None = None  # of the latest captured pass
        self._conditional = slice(None)  # the part of its batch that the selection is for
        self.selection = None
        for captured in self._modules:
            captured.install()
        backends.wrap()
        self._hooks = [
            model.register_forward_pre_hook(Hook(self, "_begin"), with_kwargs=True),
            # Prepended: captures end in the reverse order of their beginning.
            model.register_forward_hook(Hook(self, "_end"), always_call=True, prepend=True),
        ]
        registry.add(self)

    def __repr__(self) -> str:
        state = "removed" if self._removed else "enabled" if self._enabled else "not enabled"
        return f"<MapCapture of {type(self._model).__name__}, blocks {list(self._blocks)}, {state}>"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"MapCapture has no attribute {name!r}; selection and enabled can be set")
        super().__setattr__(name, value)

    @property
    def blocks(self) -> tuple[int, ...]:
        return self._blocks

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        check_flag("enabled", enabled)
        self._enabled = enabled

    @property
    def selection(self) -> TokenSelection | None:
        """The tokens to capture in the following forward passes; None captures nothing."""
        return self._guidance.selection

    @selection.setter
    def selection(self, selection: TokenSelection | None) -> None:
        if selection is not None and not isinstance(selection, TokenSelection):
            raise no_selection(selection)
        if selection is not None and self._removed:
            raise RuntimeError(_REMOVED)
        with self._lock:
            self._guidance.selection = selection

    @property
    def ready(self) -> bool:
        """Whether there are maps to read: a captured pass has completed and its maps were not taken yet."""
        complete = all(captured.maps is not None for captured in self._modules)
        return complete and not self._passes.open and not self._ran_outside

    @property
    def value(self) -> Tensor:
        """float32 ``[B, G, h, w]``, of a video ``[B, G, f, h, w]``, of the latest captured pass.

        B is the batch size of the selection.

        Maps of different resolution (UNets) are interpolated bilinearly to the finest of them.

        Raises:
            RuntimeError: no forward pass has run all the chosen blocks yet; the latest pass was another thread's or
                another asyncio task's although this one has run captured passes too; or the blocks ran since in a call
                of ``model.forward``, which calls no hooks.
        """
        with self._lock:
            self._passes.check_reader()
            if self._ran_outside:
                raise RuntimeError(
                    "the chosen blocks ran after the latest captured pass, in a call that the capture did not see: "
                    "call the transformer itself, not transformer.forward(...)"
                )
            if self._value is None:
                self._value = self._mean()
            return self._value

    def take(self) -> Tensor:
        """Returns ``value`` and releases it: the handle keeps neither the maps nor their graph until the next pass."""
        with self._lock:
            value = self.value
            self._clear()
        return value

    def remove(self) -> None:
        """Removes the capture and restores the model. The maps stay readable, and no others can be captured."""
        if not self._hooks:
            return
        self._removed = True
        registry.discard(self)
        for hook in self._hooks:
            hook.remove()
        for captured in self._modules:
            captured.remove()
        backends.unwrap()
        self._checkpointing.end()
        self._passes.current = None  # so that recording processors set again later record nothing
        self._hooks = []

    def __enter__(self) -> MapCapture:
        if self._removed:
            raise RuntimeError(_REMOVED)
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model:  # a DataParallel replica, which shares this hook
            return
        with self._lock:
            self._passes.reset()
            selection = self.selection
            if selection is None or not self.enabled:
                return
            if model.forward != self._forward:
                self._forward, self._signature = model.forward, inspect.signature(model.forward)
            bound = self._signature.bind_partial(*args, **kwargs).arguments
            arguments = {**bound, **kwargs}  # also those that the signature has as **kwargs
            hook, pag = self._perturbations.in_this_pass()
            cause = "skip_layers" if arguments.get("skip_layers") else hook
            self._skipped = (
                f". The latest pass was not captured, because guidance changed it ({cause})" if cause else ""
            )
            if cause:
                return
            try:
                selection.check_unchanged()
                _check_parallel(model)
                image = self._family.image(model, arguments)
            except BaseException as error:
                self._clear()
                if isinstance(error, KeyError):
                    raise ValueError(f"transformer must be called with {error} while maps are captured") from None
                raise
            if image is None:  # a pass that the family leaves out
                return
            self._clear()
            self._image = self._given.in_place_of(image, arguments)
            start, length = self._image.text or (0, None)
            if length is not None:
                _check_text(selection, length)
            whole, self._conditional, expected = self._guidance.for_pass(selection, arguments, start, pag)
            self._image.check_samples(whole)
            if "faster_cache_denoiser" in skipping_hooks(model, ""):
                expected += ". FasterCache runs the conditional half alone: call disable_cache()"
            detached = len(self._modules) if self._detach else 0
            self._passes.begin(
                ForwardPass(whole, expected, self._image.rows, torch.is_grad_enabled(), detached, self._image.keys)
            )
            self._checkpointing.begin()

    def _end(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if model is not self._model:
            return
        with self._lock:  # no other thread's pass begins before the maps are checked
            if not self._passes.end():
                if self._passes.nested and output is not None:
                    self._passes.nested = False
                    self._clear()
                    raise RuntimeError(
                        "transformer was called within its own captured pass, whose maps are lost: call a copy of it "
                        "instead (copy.deepcopy copies no capture)"
                    )
                return
            self._checkpointing.end()
            without = [captured for captured in self._modules if captured.maps is None]
            if output is None:  # the forward pass raised an exception
                if not without:
                    self._clear()
            elif without:
                names = ", ".join(captured.name for captured in without)
                raise RuntimeError(f"no maps from {names}: {explain(model, without)}")
            else:
                self._given.completed()
                self._keep()

    @property
    def _ran_outside(self) -> bool:
        return len(self._passes.outside) == len(self._modules)

    def _keep(self) -> None:
        """Copies maps that are outputs of a compiled graph: the next replay of a CUDA graph reuses their memory."""
        compiled = [captured for captured in self._modules if captured.compiled]
        found = [captured.maps for captured in compiled if captured.maps is not None]
        alike = len({(maps.shape, maps.dtype) for maps in found}) == 1
        kept = torch.stack(found).unbind() if alike else [maps.clone() for maps in found]
        for captured, maps in zip(compiled, kept, strict=True):
            captured.maps = maps

    def _clear(self) -> None:
        self._value = None
        for captured in self._modules:
            captured.clear()

    def _mean(self) -> Tensor:
        found = [captured.maps for captured in self._modules if captured.maps is not None]
        if len(found) != len(self._modules) or self._image is None:
            raise RuntimeError(
                f"no maps yet: {len(found)} of {len(self._modules)} chosen blocks have run; set a selection and call "
                f"the transformer before reading maps{self._skipped}"
            )
        own = [self._image.of_samples(maps)[self._conditional] for maps in found]
        return mean_maps(own, self._image.grid_of)


_REMOVED = "this capture was removed and captures no more passes: attach another with attach_maps"


def _check_parallel(model: Any) -> None:
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is not None:
        raise ValueError(
            "transformer uses context parallelism, which is not supported: each device computes a part of the maps. "
            "Capture in a pass without it, or set enabled = False on the capture"
        )


def _check_text(selection: TokenSelection, length: int) -> None:
    """Raises unless all selected positions are text in this pass. Reads only numbers that are known to the host."""
    if selection.text_length not in (None, length):
        raise ValueError(
            f"selection was made for text padded on the left to {selection.text_length} tokens, but this pass has "
            f"{length} tokens of text: call regions_of with the max_sequence_length of this pass"
        )
    if selection.last >= length:
        raise ValueError(
            f"selection.index must be positions of the text, 0 to {length - 1} in this pass, got {selection.first} to "
            f"{selection.last}: 0 is the first token of the text, wherever the text is among the keys"
        )
