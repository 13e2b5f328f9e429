"""The tokens of a text encoder that cover given characters of a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from star_kernels.prompts.core import Span, check_prompt, check_span

NOTHING: Span = (0, 0)  # the span of a special, padding or template token


@dataclass(frozen=True, eq=False)
class TextRegion:
    """The tokens of one text encoder, by their positions in the text of the model.

    The encoder's input is ``prefix + prompt + suffix``, truncated to ``dropped + length`` tokens. The pipeline drops
    the first ``dropped`` tokens of its output.

    Args:
        name: name of the region, used in messages and to choose encoders.
        tokenizer: a fast tokenizer of transformers.
        length: maximum number of positions, including special and padding tokens.
        start: first position, counted from the first position of the text. Regions may overlap: the two CLIP encoders
            of SD3 share their positions.
        prefix, suffix: template around the prompt.
        strips: whether the template strips whitespace around the prompt.
        dropped: number of tokens that the pipeline drops at the start of the encoder's output.
        keeps_first: whether the first token, of the template, takes the place of the first one that is not dropped.
        leading: the number of tokens that the model puts before the region, for a prompt; None if there are none.
        padded: whether the text is padded to ``length``; with a tokenizer that pads on the left this moves the text.
        right: whether the pipeline pads on the right whatever the tokenizer's side is.
        special_tokens: whether the tokenizer adds its special tokens; templates often contain their own.
        reserved: strings that the pipeline removes from prompts; a prompt that contains one is an error.
        cleans: how the pipeline rewrites a prompt. It may change whitespace and case, and replace single characters; a
            prompt that it changes otherwise is an error, because the positions of its characters are then unknown.

    Raises:
        TypeError: the tokenizer is not a fast tokenizer.
        ValueError: ``length`` is below 1, or ``start`` or ``dropped`` is negative.
    """

    name: str
    tokenizer: Any
    length: int
    start: int = 0
    prefix: str = ""
    suffix: str = ""
    strips: bool = False
    dropped: int = 0
    padded: bool = True
    special_tokens: bool = True
    reserved: tuple[str, ...] = ()
    keeps_first: bool = False
    leading: Callable[[str], int] | None = None
    right: bool = False
    cleans: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if not callable(self.tokenizer) or not getattr(self.tokenizer, "is_fast", False):
            raise TypeError(
                "tokenizer must be a fast tokenizer of transformers, which returns character offsets (in transformers "
                "5 all tokenizers with a tokenizer.json are fast; in transformers 4 use CLIPTokenizerFast instead of "
                f"CLIPTokenizer, Qwen2TokenizerFast instead of Qwen2Tokenizer), got {type(self.tokenizer).__name__}"
            )
        for name, least in (("length", 1), ("start", 0), ("dropped", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    @property
    def padded_left(self) -> bool:
        """Whether padding precedes the text, so that positions depend on ``length``."""
        return self.padded and not self.right and getattr(self.tokenizer, "padding_side", "right") == "left"

    def _rewritten(self, prompt: str) -> tuple[str, Sequence[int]]:
        """The prompt as it is tokenized, and the index in the prompt of each of its characters."""
        cleans = self.cleans or (str.strip if self.strips else None)
        if cleans is None:
            return prompt, range(len(prompt))
        text = cleans(prompt)
        return text, _places(prompt, text)

    def characters(self, prompt: str) -> list[Span]:
        """The span of the prompt that each token covers, by position in the region; (0, 0) for tokens outside it."""
        check_prompt(prompt)
        for text in self.reserved:
            if text in prompt:
                raise ValueError(f"prompt must not contain {text!r}, which the pipeline removes, got {prompt!r}")
        text, places = self._rewritten(prompt)
        encoded = self.tokenizer(
            self.prefix + text + self.suffix,
            add_special_tokens=self.special_tokens,
            truncation=True,
            max_length=self.dropped + self.length,
            return_offsets_mapping=True,
        )
        before = len(self.prefix)
        inside = [(max(start - before, 0), min(stop - before, len(text))) for start, stop in encoded["offset_mapping"]]
        spans = [(places[start], places[stop - 1] + 1) if start < stop else NOTHING for start, stop in inside]
        spans = spans[self.dropped :]
        if self.keeps_first:
            spans[:1] = [NOTHING]
        if self.padded_left:
            spans = [NOTHING] * (self.length - len(spans)) + spans
        leading = self.leading(prompt) if self.leading is not None else 0
        return [NOTHING] * leading + spans


def _places(prompt: str, text: str) -> list[int]:
    """The index in the prompt of each character of the prompt as the pipeline rewrites it."""
    kept = [i for i, character in enumerate(prompt) if not character.isspace()]
    written = [character for character in text if not character.isspace()]
    alike = len(kept) == len(written) and all(
        prompt[i].casefold() == character.casefold() or not (prompt[i].isalnum() or character.isalnum())
        for i, character in zip(kept, written, strict=True)
    )
    if not alike:
        raise ValueError(
            f"prompt must not contain text that the pipeline rewrites, such as HTML entities, got {prompt!r}, which "
            f"becomes {text!r}: pass the rewritten prompt"
        )
    places: list[int] = []
    left = iter(kept)
    for character in text:  # whitespace follows the character before it
        places.append((places[-1] + 1 if places else 0) if character.isspace() else next(left))
    return places


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
    """Positions of the tokens that share a character with a span, in the output of one encoder.

    Whitespace does not count. A token that covers a part of a word and its neighbour (``!"``) is included. If a
    character is split into several tokens, as byte-level tokenizers do, all of them are included. Spans whose tokens
    were all truncated are omitted with one warning.

    Args:
        tokenizer, length, prefix, suffix, dropped, padded, special_tokens: see :class:`TextRegion`.
        prompt: the text.
        spans: character spans (start, stop) of the prompt.

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
        warnings.warn(f"{quoted(lost)}: truncated to {length} tokens by {region.name}, so not selected", stacklevel=2)
    return sorted(set().union(*chosen))


def matching(prompt: str, characters: Sequence[Span], span: Span) -> set[int]:
    """Positions of tokens that share a character other than whitespace with a span."""
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
