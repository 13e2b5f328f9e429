"""STAR for SD3.5 in VeRL-Omni: actor_rollout_ref.model.external_lib=star_plugin imports this module in every worker."""

import os

from transformers import AutoTokenizer

from star_kernels.integrations.verl_omni import prompts_of, register
from star_kernels.prompts import select_tokens
from star_kernels.prompts.regions import sd3_regions

# The three tokenizers of the model, and where their tokens are in its sequence of text: two CLIPs (77), then T5 (256,
# which is pipeline.max_sequence_length).
MODEL = os.environ.get("STAR_MODEL", "stabilityai/stable-diffusion-3.5-medium")
regions = sd3_regions(*(AutoTokenizer.from_pretrained(MODEL, subfolder=f"tokenizer{n}") for n in ("", "_2", "_3")))


def select(micro_batch):
    """The tokens of the quoted text of each prompt."""
    selection, _ = select_tokens(prompts_of(micro_batch), regions, source="quoted")
    return selection.to(micro_batch["all_latents"].device)


# Replaces VeRL-Omni's losses by subclasses with weights, and captures maps of the selected tokens in each step.
register(select=select, strength=1.0)
