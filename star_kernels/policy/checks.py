"""What the policy functions accept."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.policy.transitions import Transition

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def resolve_channel_dim(channel_dim: int, model_output: Tensor) -> int:
    """The channel dimension counted from the front; checks model_output on the way."""
    _check_tensor("model_output", model_output)
    if not 3 <= model_output.ndim <= 5 or 0 in model_output.shape:
        raise ValueError(
            "model_output must have 3 to 5 dimensions, none of them 0, such as [B, C, H, W], [B, C, F, H, W] or "
            f"[B, S, C], got {list(model_output.shape)}"
        )
    if not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim must be an integer, got {channel_dim!r}")
    resolved = channel_dim + model_output.ndim if channel_dim < 0 else channel_dim
    if not 1 <= resolved < model_output.ndim:
        raise ValueError(
            f"channel_dim must name a dimension of model_output after the batch, {list(model_output.shape)}, "
            f"got {channel_dim}"
        )
    return resolved


def check_latent(name: str, latent: Tensor, model_output: Tensor) -> None:
    """A tensor of the shape and device of model_output; its floating-point dtype may differ."""
    _check_tensor(name, latent)
    if latent.shape != model_output.shape:
        raise ValueError(
            f"{name} must have the shape of model_output, {list(model_output.shape)}, got {list(latent.shape)}"
        )
    _check_device(name, latent, model_output)
    if (latent.dtype == torch.float64) != (model_output.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float64 where model_output is, and only there: model_output is {model_output.dtype}, "
            f"got {latent.dtype}"
        )


def check_transition(transition: Transition, model_output: Tensor) -> None:
    if not isinstance(transition, Transition):
        raise TypeError(f"transition must be a Transition (see flow_sde), got {type(transition).__name__}")
    batch = model_output.shape[0]
    if transition.coefficients.shape[1] not in (1, batch):
        raise ValueError(
            f"transition must hold one column, or one for each of the {batch} samples, "
            f"got {transition.coefficients.shape[1]}"
        )
    _check_device("transition", transition.coefficients, model_output)


def check_objective(
    model_output: Tensor,
    channel_dim: int,
    old_log_prob: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    ratio: str,
) -> None:
    """Old log-probabilities, advantages and weights fit the latent and the kind of ratio."""
    if ratio not in ("sample", "location"):
        raise ValueError(f"ratio must be 'sample' or 'location', got {ratio!r}")
    batch, *locations = (n for d, n in enumerate(model_output.shape) if d != channel_dim)
    _check_float("old_log_prob", old_log_prob, model_output)
    if list(old_log_prob.shape) != [batch, *locations]:
        scalar = list(old_log_prob.shape) == [batch]
        if not scalar or weights is not None or ratio == "location":
            reason = " (one number a sample serves only without weights and with ratio='sample')" if scalar else ""
            raise ValueError(
                f"old_log_prob must have shape [B, *locations] = {[batch, *locations]}, "
                f"got {list(old_log_prob.shape)}{reason}"
            )
    _check_float("advantages", advantages, model_output)
    if list(advantages.shape) != [batch]:
        raise ValueError(f"advantages must have shape [B] = [{batch}], got {list(advantages.shape)}")
    if weights is not None:
        _check_weights(weights, [batch, *locations], model_output)


def _check_weights(weights: Tensor, shape: list[int], model_output: Tensor) -> None:
    _check_float("weights", weights, model_output)
    batch, *locations = shape
    grid = list(weights.shape[1:])
    divides = len(grid) == len(locations) and all(
        n > 0 and size % n == 0 for n, size in zip(grid, locations, strict=True)
    )
    if weights.shape[:1] != (batch,) or not divides or (len(locations) == 1 and grid != locations):
        coarser = " or lie on a coarser grid that divides it" if len(locations) > 1 else ""
        raise ValueError(f"weights must have shape [B, *locations] = {shape}{coarser}, got {list(weights.shape)}")


def check_weight_values(weights: Tensor) -> None:
    """Weights are finite and not negative. The compiled CPU kernel checks this itself; a GPU is not waited for."""
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        good = (weights >= 0) & weights.isfinite()
        if not bool(good.all()):
            raise ValueError(f"weights must be finite and not negative, got {float(weights[~good][0])}")


def check_clip(clip_range: float | tuple[float, float], advantage_clip: float, kl_coef: float) -> tuple[float, float]:
    """The bounds of the ratio, 1 - low and 1 + high."""
    pair = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not all(isinstance(bound, int | float) for bound in pair):
        raise TypeError(f"clip_range must be a number or a tuple (below, above) of two, got {clip_range!r}")
    if len(pair) != 2:
        raise ValueError(f"clip_range must be a number or a tuple (below, above) of two, got {clip_range!r}")
    for name, value in (("advantage_clip", advantage_clip), ("kl_coef", kl_coef)):
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
    low, high = pair
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip_range must be at least 0, its lower half at most 1, got {clip_range}")
    if not advantage_clip > 0:
        raise ValueError(f"advantage_clip must be positive, got {advantage_clip}")
    if not 0 <= kl_coef < float("inf"):
        raise ValueError(f"kl_coef must be finite and at least 0, got {kl_coef}")
    return 1.0 - low, 1.0 + high


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def _check_float(name: str, tensor: Tensor, model_output: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a float32 tensor, got {got}")
    if tensor.dtype == torch.float64 and model_output.dtype != torch.float64:
        raise TypeError(f"{name} must be float32 (float64 only with a float64 model_output), got {tensor.dtype}")
    _check_device(name, tensor, model_output)


def _check_device(name: str, tensor: Tensor, model_output: Tensor) -> None:
    if tensor.device != model_output.device:
        raise ValueError(f"{name} must be on the device of model_output, {model_output.device}, got {tensor.device}")
