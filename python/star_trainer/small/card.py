"""The model card of a small pipeline, generated from its metrics."""

from __future__ import annotations

from typing import Any


def model_card(metrics: dict[str, Any]) -> str:
    """README.md of the pipeline's folder, with front matter for the Hugging Face hub."""
    recipe, scenes = metrics["recipe"], metrics["scenes"]
    size, side = recipe["size"], recipe["size"] >> (len(recipe["vae_channels"]) - 1)
    rows = "\n".join(f"| {task} | {found['graded']:.3f} | {found['exact']:.3f} |" for task, found in scenes.items())
    steps = len(metrics["localisation"][0])
    blocks = "\n".join(
        f"| {block} | {row[0]:.2f} | {row[steps // 2]:.2f} | {row[-1]:.2f} |"
        for block, row in enumerate(metrics["localisation"])
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A small Stable Diffusion 3 for drawn scenes

A `StableDiffusion3Pipeline` of diffusers, trained from scratch on drawn scenes of {size} x {size} pixels: one to three
plain shapes with colours, sizes, counts and relations, or a short printed word. Its purpose is to run, test and study
reinforcement learning of text-to-image flow models without a large model or a GPU. It cannot draw anything else.

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained(
    "small-sd3",
    text_encoder_3=None,
    tokenizer_3=None,
)
pipeline(
    "a red circle left of a blue square",
    num_inference_steps={recipe["sampling_steps"]},
    guidance_scale={recipe["guidance"]},
    max_sequence_length=1,
).images[0]
```

## Models

Joint transformer: {recipe["blocks"]} blocks, {recipe["heads"]} heads of 32 channels, patches of 2 x 2 latents, RMS norm
of queries and keys. Autoencoder: {recipe["latent_channels"]} channels at {side} x {side}. Text: two CLIP encoders of
{recipe["text_width"]} channels, trained together with the transformer; {recipe["text_length"]} tokens. Each word of the
scenes is one token; quoted words are spelled letter by letter. There is no T5 encoder: diffusers inserts zero embeddings
instead, one with `max_sequence_length=1`, 256 by default; the model was trained with both. The pooled text embedding is
zero, so that the text affects the image only through attention.

## Training

`{metrics["command"]}`, seed {recipe["seed"]}: {metrics["training_minutes"]} minutes on {metrics["device"]} with
{metrics["threads"]} threads (torch {metrics["torch"]}). Data: scenes of `star_trainer.scenes`; {recipe["pool"]} for the
transformer, which was trained for {recipe["steps"]} steps with a batch size of {recipe["batch"]} by flow matching with
logit-normal noise levels.

## Metrics

Held-out prompts, {recipe["sampling_steps"]} steps, guidance {recipe["guidance"]}, scored by `star_trainer.scenes.check` with the rule
"nothing_else": the requested objects and no others.
Mean absolute error of the autoencoder: {metrics["autoencoder_error"]}.

| task | fulfilled conditions | all fulfilled |
|---|---|---|
{rows}

Correlation between the attention map of a phrase ("red circle") and the object in the final image, by block:

| block | first step | half-way | last step |
|---|---|---|---|
{blocks}

![Correlation of map and object, by block and step](localisation.png)

![Samples for held-out prompts](samples.png)
"""
