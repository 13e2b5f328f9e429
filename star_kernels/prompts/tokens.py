"""Which tokens of a text encoder stand for which characters of a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from star_kernels.prompts.core import Span, check_prompt, check_span

NOTHING: Span = (0, 0)  # the characters of a special, padding or template token


@dataclass(frozen=True, eq=False)
class TextRegion:
    """The tokens of one text encoder in the joint sequence of image and text.

    The encoder's input is ``prefix + prompt + suffix``, cut to ``dropped + length`` tokens, of which the pipeline drops
    the first ``dropped``.

    Args:
        name: what messages call it.
        tokenizer: a fast tokenizer of transformers.
        length: the positions that it may take, special and padding tokens included.
        start: its first position, counted from the first position of the text. Regions may overlap, as those of SD3's
            two CLIP encoders do, which share positions.
        after_image: whether the image's tokens come before the text in the joint sequence.
        prefix, suffix: a template around the prompt.
        strips: whether the template takes the space around the prompt away.
        dropped: tokens of the template that the pipeline takes off the front of the encoder's output.
        padded: whether the text is padded to ``length``; this moves it where the tokenizer pads on the left.
        special_tokens: whether the tokenizer adds its special tokens; templates often bring their own.
        reserved: strings that the pipeline takes out of prompts; a prompt that holds one is an error.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: a length below 1, a negative start or dropped.
    """

    name: str
    tokenizer: Any
    length: int
    start: int = 0
    after_image: bool = False
    prefix: str = ""
    suffix: str = ""
    strips: bool = False
    dropped: int = 0
    padded: bool = True
    special_tokens: bool = True
    reserved: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.tokenizer) or not getattr(self.tokenizer, "is_fast", False):
            raise TypeError(
                "tokenizer must be a fast tokenizer of transformers, which knows the characters behind its tokens "
                "(all of transformers 5 with a tokenizer.json are; in transformers 4 use CLIPTokenizerFast instead of "
                f"CLIPTokenizer, Qwen2TokenizerFast instead of Qwen2Tokenizer), got {type(self.tokenizer).__name__}"
            )
        for name, least in (("length", 1), ("start", 0), ("dropped", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    @property
    def padded_left(self) -> bool:
        """Whether padding comes before the text, so that positions depend on ``length``."""
        return self.padded and getattr(self.tokenizer, "padding_side", "right") == "left"

    def characters(self, prompt: str) -> list[Span]:
        """The characters of the prompt behind each token, by position in the region; (0, 0) where there are none."""
        check_prompt(prompt)
        for text in self.reserved:
            if text in prompt:
                raise ValueError(f"prompt must not hold {text!r}, which the pipeline takes out, got {prompt!r}")
        stripped = prompt.strip() if self.strips else prompt
        offset = len(prompt) - len(prompt.lstrip()) if self.strips else 0
        encoded = self.tokenizer(
            self.prefix + stripped + self.suffix,
            add_special_tokens=self.special_tokens,
            truncation=True,
            max_length=self.dropped + self.length,
            return_offsets_mapping=True,
        )
        shift = offset - len(self.prefix)  # from the encoder's text to the prompt
        begin, end = offset, offset + len(stripped)
        spans = [
            (max(start + shift, begin), min(stop + shift, end))
            if start < stop and start + shift < end and begin < stop + shift
            else NOTHING
            for start, stop in encoded["offset_mapping"]
        ]
        spans = spans[self.dropped :]
        if self.padded_left:
            spans = [NOTHING] * (self.length - len(spans)) + spans
        return spans


def token_positions(
    tokenizer: Any,
    prompt: str,
    spans: Iterable[Span],
    *,
    length: int,
    prefix: str = "",
    suffix: str = "",
    dropped: int = 0,
    padded: bool = True,
    special_tokens: bool = True,
) -> list[int]:
    """Positions, in one encoder's output, of the tokens that share a character with a span.

    Space does not count as a character. A token that a word shares with its neighbour (``!"``) belongs to the word.
    Where a character is split into several tokens, as byte-level tokenizers do, all of them are taken. Words beyond the
    limit are left out with one warning.

    Args:
        tokenizer, length, prefix, suffix, dropped, padded, special_tokens: see :class:`TextRegion`.
        prompt: the text.
        spans: characters [start, stop) of it.

    Example:
        >>> token_positions(clip_tokenizer, "a red bench", [(2, 5)], length=77)
        [2]
    """
    region = TextRegion(
        "the tokenizer",
        tokenizer,
        length,
        prefix=prefix,
        suffix=suffix,
        dropped=dropped,
        padded=padded,
        special_tokens=special_tokens,
    )
    characters = region.characters(prompt)
    spans = list(spans)
    for span in spans:
        check_span(span, prompt)
    chosen = [matching(prompt, characters, span) for span in spans]
    lost = [prompt[start:stop] for (start, stop), positions in zip(spans, chosen, strict=True) if not positions]
    if lost:
        warnings.warn(f"{quoted(lost)}: no token among the {length} of {region.name}; left out", stacklevel=2)
    return sorted(set().union(*chosen))


def matching(prompt: str, characters: Sequence[Span], span: Span) -> set[int]:
    """Positions whose characters have one in common with a span, other than space."""
    begin, end = span
    found = set()
    for position, (start, stop) in enumerate(characters):
        common = prompt[max(start, begin) : min(stop, end)] if start < end and begin < stop else ""
        if common.strip():
            found.add(position)
    return found


def quoted(words: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return ", ".join(map(repr, words[:shown])) + more
