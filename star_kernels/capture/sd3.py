"""SD3 and SD3.5: joint attention over [image, text], called through ``F.scaled_dot_product_attention``.

The family's own processor runs unchanged; only its one call of attention is answered by star_kernels. SD3.5's second
attention (``attn2``) sees the image alone and is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from star_kernels.attention import attention

if TYPE_CHECKING:
    from star_kernels.capture import MapCapture

PROCESSORS = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")


def attentions(model: Any) -> list[Any]:
    """The joint attention module of every block."""
    return [block.attn for block in model.transformer_blocks]


def grid(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of image tokens for the arguments of a forward pass."""
    latent: Tensor = args[0] if args else kwargs["hidden_states"]
    patch = model.config.patch_size
    return latent.shape[-2] // patch, latent.shape[-1] // patch


def check_processor(processor: Any) -> None:
    if type(processor).__name__ not in PROCESSORS:
        raise TypeError(
            f"transformer must use the attention processors {' or '.join(PROCESSORS)}, got {type(processor).__name__}"
        )


class CapturingProcessor:
    """Runs a joint attention processor and keeps the maps of its image rows."""

    def __init__(self, processor: Any, capture: MapCapture) -> None:
        self.processor = processor
        self.capture = capture

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        with _AnswerAttention(self.capture, image_tokens=hidden_states.shape[1]):
            return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)


class _AnswerAttention(TorchFunctionMode):
    """Answers ``F.scaled_dot_product_attention`` with star_kernels.attention, and takes its maps."""

    def __init__(self, capture: MapCapture, image_tokens: int) -> None:
        super().__init__()
        self.capture = capture
        self.rows = (0, image_tokens)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        selection = self.capture.batch_selection(query.shape[0])
        result = attention(query, key, value, selection, rows=self.rows)
        self.capture.add(result.maps)
        return result.out
