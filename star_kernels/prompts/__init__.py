"""From a prompt to the tokens of its core content.

``select_tokens`` does everything in one call: it returns a TokenSelection for a batch of prompts. Its parts are the
sources, functions that return the :class:`Core` of a prompt as character spans (``core_content`` chooses among them);
:class:`TextRegion`, which describes the positions of an encoder's tokens in the text of a model (``regions_of`` reads
them from a diffusers pipeline); and ``token_positions``, which maps character spans to token positions.
"""

from star_kernels.prompts.content import core_content
from star_kernels.prompts.core import Core, Phrase
from star_kernels.prompts.regions import regions_of
from star_kernels.prompts.select import PromptSelection, select_tokens
from star_kernels.prompts.sources.geneval import geneval
from star_kernels.prompts.sources.phrases import phrases
from star_kernels.prompts.sources.quotes import quoted_text
from star_kernels.prompts.sources.words import content_words
from star_kernels.prompts.tokens import TextRegion, token_positions

__all__ = [
    "Core",
    "Phrase",
    "PromptSelection",
    "TextRegion",
    "content_words",
    "core_content",
    "geneval",
    "phrases",
    "quoted_text",
    "regions_of",
    "select_tokens",
    "token_positions",
]
