"""What VeRL-Omni's engines do not pass to a loss: the sampled latent, the sampler, weights and maps."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor

from star_kernels.integrations.agreement import log_prob_agreement
from star_kernels.integrations.record import RecordedMaps, record_maps
from star_kernels.integrations.verl_omni.losses import (
    MAPS,
    NEW_LOG_PROB,
    NEXT_LATENT,
    OLD_LOG_PROB,
    SDE_TYPE,
    WEIGHTS,
    check,
)
from star_kernels.selection import TokenSelection

Select = Callable[[Any], TokenSelection]
LossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class _Feed:
    select: Select | None = None
    capture: dict[str, Any] = field(default_factory=dict)
    supported: bool = True  # whether the engine's losses support weights


def feed_latents(
    engine: type[Any], select: Select | None = None, *, supported: bool = True, **capture: Any
) -> type[Any]:
    """Patches an engine's ``forward_step(micro_batch, loss_function, forward_only, step)`` to pass latents to its loss.

    The class is modified in place; a second call only replaces the options. Calls without a loss function are
    unchanged. Sampler and attention backend are those of the engine's ``model_config``.

    Args:
        engine: the engine class, whose instances have the diffusers model as ``module``.
        select: a function that returns the selected tokens of a micro-batch, on the model's device. The maps of the
            first forward pass of the step are then passed to the loss as "star_maps", detached: those of the
            conditional pass of the trained model, or in DiffusionNFT of the old one. If None, no maps are captured.
        supported: if False, weights, maps and ``select`` are an error in this engine.
        capture: options of :func:`star_kernels.capture.capture_maps`; ``cfg`` is None by default.
    """
    engine.star_feed = _Feed(select, capture, supported)
    forward_step = engine.forward_step
    if getattr(forward_step, "feeds_latents", False):
        return engine

    @wraps(forward_step)
    def patched(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool, step: Any) -> Any:
        feed: _Feed = type(self).star_feed
        if loss_function is None or (feed.select is None and not _weights_of(micro_batch) and not feed.supported):
            return forward_step(self, micro_batch, loss_function=loss_function, forward_only=forward_only, step=step)
        if not feed.supported:
            raise NotImplementedError(
                f"{type(self).__name__} does not support weights: remove select, star_weights and star_maps"
            )
        recording: Any = nullcontext()
        if feed.select is not None:
            _check_capture(self)
            selection = _selection(self, micro_batch, feed.select)
            recording = record_maps(self.module, selection, passes=1, **{"cfg": None, **feed.capture})
        config = getattr(self, "model_config", None)
        sde_type = getattr(getattr(config, "algo", None), "sde_type", None)
        with recording as recorded:
            fed = with_latents(loss_function, micro_batch, step, recorded, sde_type=sde_type)
            result = forward_step(self, micro_batch, loss_function=fed, forward_only=forward_only, step=step)
        check.settle()  # the engine has read the loss, so the numbers have arrived
        return result

    patched.feeds_latents = True  # type: ignore[attr-defined]
    engine.forward_step = patched
    return engine


def with_latents(
    loss_function: LossFunction,
    micro_batch: Any,
    step: int,
    recorded: RecordedMaps | None = None,
    *,
    sde_type: str | None = None,
) -> LossFunction:
    """Wraps the loss function of an engine to add latent, sampler, weights and maps to its ``data``, and metrics.

    The added metrics are those of :func:`star_kernels.integrations.agreement.log_prob_agreement`:
    ``actor/rollout_log_prob_diff/step_{i}/...`` between the trained model and the rollout (of each sample, if the batch
    has "rollout_log_probs"), and ``actor/old_log_prob_diff/step_{i}/...`` between the trained and the old model (of
    each location, with weights).

    Args:
        loss_function: the loss function of the engine.
        micro_batch: optionally has "star_weights" or "star_maps" ``[B, Steps, ...]``. Latents are read from
            "all_next_latents" ``[B, Steps, ...]`` or "all_latents" ``[B, Steps + 1, ...]``.
        step: index of the step.
        recorded: maps of the forward passes of the step, of which the first are used.
        sde_type: the sampler of the engine.
    """

    @wraps(loss_function)
    def called(*arguments: Any, model_output: Mapping[str, Any], data: Any, **options: Any) -> Any:
        data.update({key: micro_batch[key][:, step] for key in _weights_of(micro_batch)})
        if recorded is not None:
            if not recorded.maps:
                raise RuntimeError("no maps were captured: the engine did not run its module in this step")
            data[MAPS] = recorded.maps[0].sum(dim=1)
        if sde_type is not None:
            data[SDE_TYPE] = sde_type
        latent = _next_latent(micro_batch, step)
        if latent is not None:
            data[NEXT_LATENT] = latent.float()
        loss, metrics = loss_function(*arguments, model_output=model_output, data=data, **options)
        return loss, metrics | _agreement(micro_batch, step, model_output, data)

    return called


def prompts_of(micro_batch: Any) -> list[str]:
    """The prompts of a micro-batch: the text of the last user message of each "raw_prompt".

    Raises:
        KeyError: the micro-batch has no "raw_prompt" (``data.return_raw_chat=True`` keeps it).
    """
    raw = micro_batch.get("raw_prompt", None)
    if raw is None:
        raise KeyError("micro_batch lacks raw_prompt: set data.return_raw_chat=True")
    return [_prompt(chat) for chat in (raw.tolist() if hasattr(raw, "tolist") else raw)]


def _prompt(chat: Any) -> str:
    chat = getattr(chat, "data", chat)  # TensorDict wraps values that are no tensors
    if isinstance(chat, str):
        return chat
    content = next((message["content"] for message in reversed(chat) if message["role"] == "user"), None)
    if isinstance(content, list):  # of parts, of which some may be images
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise ValueError(f"raw_prompt must be a chat with a message of the user, got {chat!r}")
    return content


def _weights_of(micro_batch: Any) -> list[str]:
    return [key for key in (WEIGHTS, MAPS) if micro_batch.get(key, None) is not None]


def _next_latent(micro_batch: Any, step: int) -> Tensor | None:
    """The latent after the step; None if the micro-batch has no trajectory that contains it."""
    explicit = micro_batch.get("all_next_latents", None)
    if explicit is not None:
        return explicit[:, step]
    latents, timesteps = micro_batch.get("all_latents", None), micro_batch.get("all_timesteps", None)
    if latents is None or timesteps is None or latents.shape[1] != timesteps.shape[1] + 1:
        return None
    return latents[:, step + 1]


def _selection(engine: Any, micro_batch: Any, select: Select) -> TokenSelection:
    """The selection of a micro-batch, made once for all of its steps; the micro-batch is not kept alive."""
    made = getattr(engine, "star_selection", None)
    if made is None or made[0]() is not micro_batch or made[1] is not select:
        made = (_reference(micro_batch), select, select(micro_batch))
        engine.star_selection = made
    selection: TokenSelection = made[2]
    return selection


def _reference(micro_batch: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(micro_batch)
    except TypeError:  # a dictionary
        return lambda: None


def _check_capture(engine: Any) -> None:
    """Raises if the engine computes attention over a part of the sequence on each device."""
    parallel = getattr(engine, "ulysses_sequence_parallel_size", 1)
    if parallel > 1:
        raise ValueError(
            "maps require whole sequences, so actor.fsdp_config.ulysses_sequence_parallel_size must be 1, got "
            f"{parallel}"
        )


def _agreement(micro_batch: Any, step: int, model_output: Mapping[str, Any], data: Any) -> dict[str, Any]:
    rollout = micro_batch.get("rollout_log_probs", None)
    if rollout is not None:
        rollout = rollout[:, step] if rollout.shape == micro_batch["old_log_probs"].shape else None
    pairs = {
        "rollout_log_prob_diff": (model_output.get("log_probs"), rollout),
        "old_log_prob_diff": (data.get(NEW_LOG_PROB, None), data.get(OLD_LOG_PROB, None)),
    }
    metrics: dict[str, Any] = {}
    for name, (log_prob, other) in pairs.items():
        if log_prob is not None and other is not None:
            found = log_prob_agreement(log_prob, other)
            for kind, value in found._asdict().items():
                metrics[f"actor/{name}/step_{step}/{kind}"] = _metric(value, kind)
    return metrics


def _metric(value: Tensor, aggregation: str) -> Any:
    """A value that VeRL aggregates over micro-batches and devices by its mean or largest."""
    try:
        module = importlib.import_module("verl.utils.metric")
    except ImportError:
        return value
    return module.Metric(aggregation=aggregation, value=value)
