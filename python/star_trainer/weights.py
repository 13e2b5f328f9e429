"""Tensors of a model whose parameters may be sharded over processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def whole(value: Tensor) -> Tensor:
    """The full tensor of one that may be sharded. All processes must call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Copies of the trained parameters and all buffers on the CPU, under the names of the unwrapped model.

    All processes must call it.
    """
    return on_host(get_model_state_dict(model, options=_WHOLE))


def on_host(values: dict[str, Any]) -> dict[str, Tensor]:
    """Copies on the CPU, also of tensors that are there already: these would change as training continues."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}


def sharded_like(value: Tensor, other: Tensor) -> Tensor:
    """A full tensor, sharded in the same way as another tensor."""
    if not hasattr(other, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def check_finite(name: str, values: dict[str, Tensor]) -> None:
    """Raises FloatingPointError, naming a tensor, if a value is NaN or infinite."""
    bad = [key for key, value in values.items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{name} contain NaN or infinity in {len(bad)} of {len(values)} tensors, such as {bad[0]}"
        )
