"""``python -m star_kernels.maps``: attention maps of the phrases of a prompt, from one generation.

Runs a diffusers text-to-image pipeline ("small", the included model, or a local folder or Hugging Face Hub id),
captures the attention maps of the phrases at every denoising step, and writes to a folder: ``image.png``, the image;
``strip.png``, the maps of each phrase at up to ten steps; ``phrases.png``, a panel for each phrase; ``maps.npy``,
float32 [Steps, G, h, w]; and ``maps.json``, the settings and the mean, maximum and perplexity of every map.

Of a text-to-video pipeline it writes ``video.gif``, the video; ``frames.png``, the mean maps of each phrase in up to
ten frames; ``phrase-1.png`` and so on, the maps of a phrase in those frames at up to ten steps; ``maps.npy``, float32
[Steps, G, f, h, w]; and ``maps.json``.

With ``--rank-blocks`` it ranks the attention blocks of the model instead (see :mod:`star_kernels.rank_blocks`), for one
or several prompts, prints a table and the option ``blocks=[...]`` to copy, and writes ``blocks.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels.command_line import Parser
from star_kernels.generation import arguments_of_call, generate
from star_kernels.pipelines import load_pipeline
from star_kernels.prompts import core_content
from star_kernels.rank_blocks import rank_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Drawing(NamedTuple):
    """An image or a video and the attention maps of its generation."""

    image: Any  # PIL, or a list of the frames of a video
    maps: Tensor  # float32 [Steps, G, h, w], of a video [Steps, G, f, h, w]
    names: tuple[str, ...]  # the G phrases
    sigmas: list[float]  # sigma of each step, NaN if the scheduler has none


def draw(
    pipeline: Any,
    prompt: str,
    *,
    phrases: list[str] | None = None,
    blocks: str | list[int] = "default",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    generator: torch.Generator | None = None,
    **call: Any,
) -> Drawing:
    """Generates an image or a video for one prompt and captures the maps of every step.

    Args:
        pipeline: a text-to-image or text-to-video pipeline that :func:`star_kernels.prompts.regions_of` supports.
        prompt: the prompt.
        phrases: the phrases to map, each of which must occur in the prompt; the prompt's core content by default.
        blocks: see :func:`star_kernels.capture.attach_maps`.
        height, width, num_inference_steps, guidance_scale, max_sequence_length, generator: arguments of the pipeline
            call; the pipeline's defaults if None.
        call: further arguments of the call that this pipeline accepts, such as ``negative_prompt``.

    Raises:
        TypeError, ValueError: unsupported pipeline, or a phrase that the prompt does not contain; the message names it.
    """
    common = arguments_of_call(
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length,
        generator=generator,
    )
    found = generate(pipeline, prompt, phrases, [blocks], {**common, **call})
    return Drawing(found.image, torch.stack([step[0] for step in found.maps]), found.names, found.sigmas)


def write(drawing: Drawing, prompt: str, folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Writes the figures, the maps and their statistics, and returns the paths of the files."""
    import numpy as np

    from star_kernels import figures

    folder.mkdir(parents=True, exist_ok=True)
    labels = [f"step {i}" if math.isnan(s) else f"sigma {s:.2f}" for i, s in enumerate(drawing.sigmas)]
    drawn: dict[str, Any] = {}
    if drawing.maps.ndim == 5:
        paths = [folder / "video.gif"]
        first, *others = drawing.image
        first.save(paths[0], save_all=True, append_images=others, duration=80, loop=0)
        options = {"images": drawing.image, "title": prompt}
        drawn["frames.png"] = figures.frames(drawing.maps.mean(dim=0), names=drawing.names, **options)
        steps_shown = sorted({round(i * (len(labels) - 1) / 9) for i in range(10)})
        shown = [labels[i] for i in steps_shown]
        for number, name in enumerate(drawing.names, start=1):
            options["title"] = f"{name}: {prompt}"
            maps = drawing.maps[steps_shown, number - 1]
            drawn[f"phrase-{number}.png"] = figures.frames(maps, names=shown, **options)
    else:
        paths = [folder / "image.png"]
        drawing.image.save(paths[0])
        drawn["strip.png"] = figures.strip(
            drawing.maps, images=drawing.image, labels=labels, names=drawing.names, title=prompt
        )
        drawn["phrases.png"] = figures.phrases(drawing.image, drawing.maps.mean(dim=0), drawing.names, title=prompt)
    for file, figure in drawn.items():
        paths.append(folder / file)
        figure.savefig(paths[-1], dpi=120)
    paths += [folder / "maps.npy", folder / "maps.json"]
    np.save(paths[-2], drawing.maps.numpy())
    steps = [
        {"step": i, "sigma": None if math.isnan(s) else round(s, 6), "phrases": [_summary(m) for m in maps]}
        for i, (s, maps) in enumerate(zip(drawing.sigmas, drawing.maps, strict=True))
    ]
    record = {**settings, "prompt": prompt, "phrases": list(drawing.names), "shape": list(drawing.maps.shape)}
    _write_json(paths[-1], {**record, "steps": steps})
    return paths


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # unpaired surrogates become JSON escapes


def _summary(values: Tensor) -> dict[str, float]:
    """Mean and maximum of a map, and its perplexity: exp of the entropy, the effective number of its positions."""
    share = (values / values.sum().clamp(min=1e-30)).flatten().double()
    perplexity = float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))
    return {
        "mean": round(float(values.mean()), 8),
        "maximum": round(float(values.max()), 8),
        "perplexity": round(perplexity, 3),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rank_blocks and options.blocks != "default":
        parser.error("--rank-blocks ranks all blocks and does not accept --blocks")
    if not options.rank_blocks and len(options.prompt) > 1:
        parser.error(f"--prompt must be given once, got {len(options.prompt)} prompts; --rank-blocks accepts several")
    try:
        import diffusers  # noqa: F401  before the pipeline is loaded

        import star_kernels.figures  # noqa: F401
    except ImportError as missing:
        print(f"star_kernels.maps requires the extras diffusers and figures: {missing}", file=sys.stderr)
        return 2
    try:
        for prompt in options.prompt if options.phrase else ():  # before the pipeline is loaded
            core_content(prompt, options.phrase)
    except ValueError as problem:
        print(f"--phrase: {problem}", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        print(f"--out must be a writable folder, got {str(options.out)!r}: {problem.strerror}", file=sys.stderr)
        return 2
    dtype = DTYPES[options.dtype or ("bfloat16" if options.device != "cpu" else "float32")]
    try:
        pipeline = load_pipeline(options.model, dtype)
    except (OSError, ValueError) as problem:
        print(
            "--model must be 'small', or the folder or Hub id of a diffusers pipeline, got "
            f"{options.model!r}: {problem}",
            file=sys.stderr,
        )
        return 2
    pipeline.to(options.device)
    pipeline.set_progress_bar_config(disable=None)
    call = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
    }
    call = {name: value for name, value in call.items() if value is not None}
    generator = torch.Generator("cpu").manual_seed(options.seed)
    settings = {"model": options.model, "seed": options.seed, "dtype": str(dtype).removeprefix("torch."), **call}
    arguments_of_both = {"phrases": options.phrase, "generator": generator, **call}
    try:
        if options.rank_blocks:
            ranking = rank_blocks(pipeline, options.prompt, **arguments_of_both)
            print(ranking.table())
            paths = [options.out / "blocks.json"]
            _write_json(paths[0], {**settings, "prompts": options.prompt, **ranking.as_dict()})
        else:
            drawing = draw(pipeline, options.prompt[0], blocks=options.blocks, **arguments_of_both)
            paths = write(drawing, options.prompt[0], options.out, settings)
    except (TypeError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m star_kernels.maps", description=__doc__)
    parser.add_argument(
        "--model",
        required=True,
        type=os.path.expanduser,
        help='"small", the model that is included, or a local folder or Hugging Face Hub id of a diffusers pipeline',
    )
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        type=_text,
        help="prompt of the image; may be repeated with --rank-blocks",
    )
    parser.add_argument("--out", required=True, type=_path, help="folder for the output files; created if missing")
    parser.add_argument(
        "--phrase",
        action="append",
        type=_text,
        help="phrase of the prompt to map, may be repeated (default: core content)",
    )
    parser.add_argument(
        "--blocks",
        type=_blocks,
        default="default",
        help='attention blocks to average: "all", "default" or indices such as 8,9,10',
    )
    parser.add_argument(
        "--rank-blocks", action="store_true", help="rank all attention blocks instead of drawing the maps"
    )
    count = _number(int, 1)
    parser.add_argument("--steps", type=count, help="number of denoising steps (default: that of the pipeline)")
    parser.add_argument("--guidance", type=_number(float, 0), help="guidance scale (default: that of the pipeline)")
    parser.add_argument("--frames", type=count, help="number of frames of a video (default: that of the pipeline)")
    parser.add_argument("--height", type=count, help="image height in pixels (default: that of the pipeline)")
    parser.add_argument("--width", type=count, help="image width in pixels (default: that of the pipeline)")
    parser.add_argument(
        "--seed", type=_number(int, -(2**63), 2**64 - 1), default=0, help="seed of the initial noise (default: 0)"
    )
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device (default: cuda if available, else cpu)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the pipeline (default: float32 on a CPU, else bfloat16)"
    )
    return parser


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be blank, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:  # the terminal uses another encoding
        raise argparse.ArgumentTypeError(f"must be Unicode text, got {text!r}") from None
    return text


def _number(kind: type[int | float], least: int, most: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            what = "an integer" if kind is int else "a number"
            upper = f" and at most {most}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"must be {what} of at least {least}{upper}, got {text!r}")
        return value

    return read


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a torch device available here, got {text!r}: {reason}") from None
    return text


def _blocks(text: str) -> str | list[int]:
    if text in ("all", "default"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be "all", "default" or indices such as 8,9,10, got {text!r}') from None


if __name__ == "__main__":
    sys.exit(main())
