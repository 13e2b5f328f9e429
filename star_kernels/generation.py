"""Runs a text-to-image or text-to-video pipeline of diffusers for one prompt, with the maps of every denoising step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor


class Generated(NamedTuple):
    """An image or a video and the maps of its generation."""

    image: Any  # PIL, or a list of the frames of a video
    maps: list[list[Tensor]]  # for each step and each choice of blocks, float32 [G, h, w] or [G, f, h, w] on the CPU
    names: tuple[str, ...]  # the G phrases
    sigmas: list[float]  # sigma of each step, NaN if the scheduler has none


def generate(
    pipeline: Any,
    prompt: str,
    phrases: list[str] | None,
    choices: Sequence[str | Sequence[int]],
    call: dict[str, Any],
) -> Generated:
    """Generates an image and captures its maps for several choices of blocks, none of which share a block.

    Args:
        pipeline: a text-to-image or text-to-video pipeline that :func:`star_kernels.prompts.regions_of` supports.
        prompt: the prompt.
        phrases: the phrases to map, each of which must occur in the prompt; the prompt's core content if None.
        choices: values of ``blocks``, see :func:`star_kernels.capture.attach_maps`.
        call: further arguments of the pipeline call.
    """
    from star_kernels import prompts
    from star_kernels.capture import attach_maps

    if "callback_on_step_end" not in inspect.signature(type(pipeline).__call__).parameters:
        raise ValueError(
            f"pipeline must accept callback_on_step_end, {type(pipeline).__name__} does not: use attach_maps and read "
            "the maps after each call of its transformer"
        )
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if call.get(name, 1) != 1:
            raise ValueError(f"{name} must be 1, because maps are drawn of one generation, got {call[name]!r}")
    if phrases is not None and (isinstance(phrases, str) or not phrases):
        raise ValueError(f"phrases must be a list of at least one phrase, such as ['red bench'], got {phrases!r}")
    core = prompts.core_content(prompt, "auto" if phrases is None else phrases)
    regions = prompts.regions_of(pipeline, max_sequence_length=call.get("max_sequence_length"))
    models = denoisers(pipeline)
    video = makes_video(pipeline)
    selection, names = prompts.select_tokens([core], regions, per_phrase=True)
    selection = selection.to(next(models[0].parameters()).device)
    found: list[list[Tensor]] = []
    sigmas: list[float] = []
    halves = "last" if doubles(pipeline, call) else "auto"
    if video:
        call = {"output_type": "pil", **call}

    def enable(enabled: bool) -> None:
        for capture in (capture for of_model in captures for capture in of_model):
            capture.enabled = enabled

    def after_step(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        ran = next((of_model for of_model in captures if of_model[0].ready), captures[0])  # one model runs in each step
        found.append([capture.take()[0].cpu() for capture in ran])
        schedule = getattr(pipe.scheduler, "sigmas", None)
        sigmas.append(float(schedule[step]) if schedule is not None else math.nan)
        enable(True)
        return state

    with ExitStack() as stack:
        captures = [
            [stack.enter_context(attach_maps(model, selection, blocks=blocks, cfg=halves)) for blocks in choices]
            for model in models
        ]
        # Later passes in the same step are unconditional or perturbed. Registered last, the hook runs after the
        # captures have ended.
        for model in models:
            hook = model.register_forward_hook(lambda *arguments: enable(False))
            stack.callback(hook.remove)
        result = pipeline(prompt=prompt, callback_on_step_end=after_step, **call)
    if not found:
        raise ValueError(f"num_inference_steps must be at least 1, got {call.get('num_inference_steps')}")
    return Generated(result.frames[0] if video else result.images[0], found, names[0], sigmas)


def denoisers(pipeline: Any) -> list[Any]:
    """The transformer or UNet of a pipeline; in Wan 2.2 there may be two, for high and low noise."""
    found = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    return [model for model in found if model is not None] or [pipeline.unet]


def makes_video(pipeline: Any) -> bool:
    return "num_frames" in inspect.signature(type(pipeline).__call__).parameters


def doubles(pipeline: Any, call: dict[str, Any]) -> bool:
    """Whether each step is one forward pass with a batch that is doubled for classifier-free guidance."""
    if not any("StableDiffusion" in cls.__name__ for cls in type(pipeline).__mro__):
        return False  # the family of the model says whether a doubled batch is guidance
    return float(call.get("guidance_scale", 7.0)) > 1


def arguments_of_call(**given: Any) -> dict[str, Any]:
    """The arguments that are not None, for which the pipeline has its own defaults."""
    return {name: value for name, value in given.items() if value is not None}
