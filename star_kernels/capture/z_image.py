"""Z-Image: joint attention over [image, text], both padded to a multiple of 32 tokens by learned tokens.

The attention of the refiners is not captured. Latents are a list with an entry for each sample; all must have the same
size. Pipelines concatenate the conditional and the unconditional half, in this order. The mode with several images of
Z-Image-Omni, whose order of tokens is another, is an error. No publication names the blocks that find the words best:
the default is all blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens

MULTIPLE = 32  # of tokens, SEQ_MULTI_OF in diffusers


def attentions(model: Any) -> list[Any]:
    return [layer.attention for layer in model.layers]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    latents = arguments["x"]
    if isinstance(latents[0], (list, tuple)):
        raise ValueError("x must be a list of latents: maps of several images for each sample (omni) are not supported")
    sizes = {tuple(latent.shape[-3:]) for latent in latents}  # (frames, height, width)
    if len(sizes) > 1:
        raise ValueError(f"x must be latents of one size while maps are captured, got {sorted(sizes)}")
    frames, height, width = sizes.pop()
    if frames != 1:
        raise ValueError(f"x must be latents of images, with one frame each, got {frames} frames")
    patch = arguments.get("patch_size", 2)
    rows, columns = height // patch, width // patch
    text = max(_padded(len(caption)) for caption in arguments["cap_feats"])
    tokens = rows * columns
    return ImageTokens(rows=(0, tokens), grid=(rows, columns), text=(_padded(tokens), text))


def _padded(tokens: int) -> int:
    return tokens + -tokens % MULTIPLE


FAMILY = Family(attentions, image, processors=("ZSingleStreamAttnProcessor",), cfg="first")
