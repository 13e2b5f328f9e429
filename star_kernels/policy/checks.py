"""Checks of the arguments of the policy functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.checks import check_dense, check_number, readable
from star_kernels.policy.arguments import Arguments, Declaration, Kind, NftArguments, PolicyArguments, has_phrases
from star_kernels.policy.transitions import Transition

CLIP_RANGE = 1e-4  # the default
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def resolve_channel_dim(channel_dim: int, model_output: Tensor) -> int:
    """The channel dimension counted from the front; checks model_output on the way."""
    _check_tensor("model_output", model_output)
    if not 3 <= model_output.ndim <= 5 or 0 in model_output.shape:
        raise ValueError(
            "model_output must have 3 to 5 dimensions, none of them 0, such as [B, C, H, W], [B, C, F, H, W] or "
            f"[B, S, C], got {list(model_output.shape)}"
        )
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
        raise TypeError(f"channel_dim must be an integer, got {channel_dim!r}")
    resolved = channel_dim + model_output.ndim if channel_dim < 0 else channel_dim
    if not 1 <= resolved < model_output.ndim:
        raise ValueError(
            f"channel_dim must name a dimension of model_output after the batch, {list(model_output.shape)}, "
            f"got {channel_dim}"
        )
    return resolved


def check_latent(name: str, latent: Tensor, model_output: Tensor) -> None:
    """A latent has the shape and device of model_output; its floating-point dtype may differ."""
    _check_tensor(name, latent)
    if latent.shape != model_output.shape:
        raise ValueError(
            f"{name} must have the shape of model_output, {list(model_output.shape)}, got {list(latent.shape)}"
        )
    _check_device(name, latent, model_output)
    if (latent.dtype == torch.float64) != (model_output.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float64 exactly if model_output is: model_output is {model_output.dtype}, "
            f"got {latent.dtype}"
        )


def check_transition(transition: Transition) -> None:
    if not isinstance(transition, Transition):
        raise TypeError(f"transition must be a Transition (see flow_sde), got {type(transition).__name__}")


def _check_columns(transition: Transition, model_output: Tensor) -> None:
    batch = model_output.shape[0]
    if transition.coefficients.shape[1] not in (1, batch):
        raise ValueError(
            f"transition must have one column, or one for each of the {batch} samples, "
            f"got {transition.coefficients.shape[1]}"
        )
    _check_device("transition", transition.coefficients, model_output)


def check_ratio(ratio: str) -> bool:
    """Whether each location has a ratio."""
    if ratio not in ("sample", "location"):
        raise ValueError(f"ratio must be 'sample' or 'location', got {ratio!r}")
    return ratio == "location"


def check_old_log_prob(
    old_log_prob: Tensor, model_output: Tensor, channel_dim: int, weights: Tensor | None, per_location: bool
) -> None:
    """Old log-probabilities fit the latent, the weights and the kind of ratio."""
    batch, *locations = _locations(model_output, channel_dim)
    _check_float("old_log_prob", old_log_prob, model_output)
    if list(old_log_prob.shape) != [batch, *locations]:
        scalar = list(old_log_prob.shape) == [batch]
        if not scalar or weights is not None or per_location:
            reason = " (shape [B] is accepted only without weights and with ratio='sample')" if scalar else ""
            raise ValueError(
                f"old_log_prob must have shape [B, *locations] = {[batch, *locations]}, "
                f"got {list(old_log_prob.shape)}{reason}"
            )


def check_numbers(name: str, numbers: Tensor, model_output: Tensor) -> None:
    """One float32 number for each sample."""
    _check_float(name, numbers, model_output)
    batch = model_output.shape[0]
    if list(numbers.shape) != [batch]:
        raise ValueError(f"{name} must have shape [B] = [{batch}], got {list(numbers.shape)}")


def check_mask(mask: Tensor, model_output: Tensor, channel_dim: int) -> None:
    """A mask is bool ``[B, *locations]``; on a CPU it must keep at least one location of each sample."""
    _check_mask(mask, model_output, channel_dim)
    if readable(mask):
        empty = ~mask.flatten(1).any(dim=1)
        if bool(empty.any()):
            raise ValueError(
                f"mask must keep a location of every sample, got none for sample {int(empty.nonzero()[0])}"
            )


def _check_mask(mask: Tensor, model_output: Tensor, channel_dim: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, true for locations that count, got {got}")
    check_dense("mask", mask)
    shape = _locations(model_output, channel_dim)
    if list(mask.shape) != shape:
        raise ValueError(f"mask must have shape [B, *locations] = {shape}, got {list(mask.shape)}")
    _check_device("mask", mask, model_output)


def check_advantages(
    advantages: Tensor, weights: Tensor | None, model_output: Tensor, channel_dim: int, weighted_kl: bool
) -> None:
    """Advantages and weights fit each other: advantages are ``[B, G]`` exactly if weights are ``[B, G, *grid]``."""
    _check_float("advantages", advantages, model_output)
    if weights is not None:
        _check_float("weights", weights, model_output)
    elif list(advantages.shape) == [model_output.shape[0]]:
        return
    batch, *locations = _locations(model_output, channel_dim)
    shape = list(advantages.shape)
    phrases: list[int] = []
    if weights is not None and has_phrases(weights, model_output):
        phrases = shape[1:]
        if weights.shape[1] == 0:
            raise ValueError(f"weights must have at least one phrase, got {list(weights.shape)}")
        if shape != [batch, weights.shape[1]]:
            hint = "; with advantages [B] weights are [B, *locations]" if shape == [batch] else ""
            raise ValueError(
                f"advantages must have shape [B, G] = [{batch}, {weights.shape[1]}] with weights [B, G, *locations], "
                f"which have one dimension more than the locations {locations}, got advantages {shape} and weights "
                f"{list(weights.shape)}{hint}"
            )
        if weighted_kl:
            raise ValueError(
                "weighted_kl must be False with weights [B, G, *locations] (the penalty is not weighted then), got True"
            )
    elif shape not in ([batch], [batch, *locations]):
        raise ValueError(
            f"advantages must have shape [B] = [{batch}], [B, *locations] = {[batch, *locations]}, or [B, G] with "
            f"weights [B, G, *locations], got advantages {shape} and weights "
            f"{None if weights is None else list(weights.shape)}"
        )
    if weights is not None:
        _check_grid(weights, phrases, [batch, *locations])


def check_ref_model_output(ref_model_output: Tensor | None, kl_coef: float) -> None:
    """The output of the KL penalty's reference model is required if the penalty has a coefficient."""
    if kl_coef and ref_model_output is None:
        raise ValueError(f"ref_model_output must be given if kl_coef is not 0, got None and kl_coef {kl_coef}")


def check_reduction(reduction: str) -> bool:
    """Whether the loss is unreduced."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return reduction == "none"


def check_weights(weights: Tensor | None, model_output: Tensor, channel_dim: int) -> None:
    """Weights of the locations, or of a coarser grid that divides them."""
    if weights is not None:
        _check_float("weights", weights, model_output)
        _check_grid(weights, [], _locations(model_output, channel_dim))


def _check_grid(weights: Tensor, phrases: list[int], shape: list[int]) -> None:
    """The shape of weights beside locations [B, *locations]; ``phrases`` is [G] for weights of phrases, else []."""
    batch, *locations = shape
    leading = [batch, *phrases]
    grid = list(weights.shape[len(leading) :])
    divides = len(grid) == len(locations) and all(
        n > 0 and size % n == 0 for n, size in zip(grid, locations, strict=True)
    )
    if list(weights.shape[: len(leading)]) != leading or not divides or (len(locations) == 1 and grid != locations):
        coarser = " or that of a coarser grid that divides it" if len(locations) > 1 else ""
        names = "[B, G, *locations]" if phrases else "[B, *locations]"
        raise ValueError(f"weights must have shape {names} = {leading + locations}{coarser}, got {list(weights.shape)}")


def check_weight_values(weights: Tensor | None) -> None:
    """Weights are finite and not negative. The CPU kernel checks this itself; values on a GPU are not read."""
    if weights is not None and readable(weights):
        good = (weights >= 0) & weights.isfinite()
        if not bool(good.all()):
            raise ValueError(f"weights must be finite and not negative, got {float(weights[~good][0])}")


def check_clip(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """The bounds of the ratio, 1 - low and 1 + high."""
    if isinstance(clip_range, float) and 0 <= clip_range <= 1:
        return 1.0 - clip_range, 1.0 + clip_range
    pair = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not all(isinstance(bound, int | float) for bound in pair):
        raise TypeError(f"clip_range must be a number or a tuple (below, above) of two, got {clip_range!r}")
    if len(pair) != 2:
        raise ValueError(f"clip_range must be a number or a tuple (below, above) of two, got {clip_range!r}")
    for bound in pair:
        check_number("clip_range", bound)
    low, high = pair
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip_range must be at least 0, its lower half at most 1, got {clip_range}")
    return 1.0 - low, 1.0 + high


def check_kl_mask(
    kl_mask_threshold: float, clip_range: float | tuple[float, float], old_model_output: Tensor | None
) -> float:
    """The threshold of Flow-DPPO, which replaces the clip and needs the rollout's output."""
    check_number("kl_mask_threshold", kl_mask_threshold)
    if not 0 < kl_mask_threshold < float("inf"):
        raise ValueError(f"kl_mask_threshold must be positive and finite, or None, got {kl_mask_threshold}")
    if clip_range != CLIP_RANGE:
        raise ValueError(
            f"clip_range must not be given with kl_mask_threshold, which replaces the clip, got {clip_range}"
        )
    if old_model_output is None:
        raise ValueError(
            "old_model_output must be given with kl_mask_threshold: the divergence is that from the rollout's model, "
            "got None"
        )
    return float(kl_mask_threshold)


def check_coefficients(advantage_clip: float, kl_coef: float) -> None:
    check_number("advantage_clip", advantage_clip)
    check_number("kl_coef", kl_coef)
    if not advantage_clip > 0:
        raise ValueError(f"advantage_clip must be positive, got {advantage_clip}")
    if not 0 <= kl_coef < float("inf"):
        raise ValueError(f"kl_coef must be finite and at least 0, got {kl_coef}")


def check_beta(beta: float, advantage_clip: float) -> None:
    """DiffusionNFT's beta, and an advantage clip that is a finite divisor."""
    check_number("beta", beta)
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not advantage_clip < float("inf"):
        raise ValueError(f"advantage_clip must be finite, got {advantage_clip}")


def check_operator(arguments: Arguments, declared: Declaration) -> None:
    """Checks the arguments of ``torch.ops.star_kernels`` as far as the kernels rely on them; values are not read."""
    model_output, channel_dim = arguments.model_output, arguments.channel_dim
    if not 0 < channel_dim == resolve_channel_dim(channel_dim, model_output):
        raise ValueError(f"channel_dim must be counted from the front, got {channel_dim}")
    if model_output.dtype == torch.float64:
        raise TypeError("model_output must be float32, float16 or bfloat16, got torch.float64")
    if isinstance(arguments, PolicyArguments) and arguments.kl_mask_threshold:
        check_kl_mask(arguments.kl_mask_threshold, CLIP_RANGE, arguments.old_model_output)
    check_tensors(arguments, declared)


def check_tensors(arguments: Arguments, declared: Declaration) -> None:
    """Checks types, shapes, dtypes and devices, which must fit model_output and channel_dim."""
    for (name, kind), value in zip(declared.kinds.items(), arguments, strict=True):
        if value is not None or name not in declared.optional:
            _check_kind(kind, name, value, arguments)


def _check_kind(kind: Kind, name: str, value: Any, arguments: Any) -> None:
    model_output, channel_dim = arguments.model_output, arguments.channel_dim
    match kind:
        case Kind.LATENT:
            check_latent(name, value, model_output)
        case Kind.PER_SAMPLE:
            check_numbers(name, value, model_output)
        case Kind.COEFFICIENTS:
            _check_columns(Transition(value), model_output)
        case Kind.MASK:
            _check_mask(value, model_output, channel_dim)
        case Kind.ADVANTAGES:
            check_advantages(value, arguments.weights, model_output, channel_dim, arguments.weighted_kl)
        case Kind.WEIGHTS if isinstance(arguments, NftArguments):
            check_weights(value, model_output, channel_dim)
        case Kind.OLD_LOG_PROB:
            check_old_log_prob(value, model_output, channel_dim, arguments.weights, arguments.per_location)


def _locations(model_output: Tensor, channel_dim: int) -> list[int]:
    """The shape without the channels: [B, *locations]."""
    return [n for d, n in enumerate(model_output.shape) if d != channel_dim]


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        check_dense(name, tensor)


def _check_float(name: str, tensor: Tensor, model_output: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a float32 tensor, got {got}")
    if tensor.dtype == torch.float64 and model_output.dtype != torch.float64:
        raise TypeError(f"{name} must be float32 (float64 only with a float64 model_output), got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        check_dense(name, tensor)
    _check_device(name, tensor, model_output)


def _check_device(name: str, tensor: Tensor, model_output: Tensor) -> None:
    if tensor.device != model_output.device:
        raise ValueError(f"{name} must be on the device of model_output, {model_output.device}, got {tensor.device}")
