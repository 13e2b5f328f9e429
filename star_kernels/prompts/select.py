"""select_tokens: a TokenSelection for the core content of a batch of prompts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from star_kernels.checks import check_flag
from star_kernels.prompts.content import Source, core_content
from star_kernels.prompts.core import Core
from star_kernels.prompts.tokens import NOTHING, TextRegion, matching, quoted
from star_kernels.selection import EMPTY, TokenSelection

_WEIGHTS = ("token", "phrase")


class PromptSelection(NamedTuple):
    """The selected tokens of a batch of prompts, and the names of their phrases."""

    selection: TokenSelection
    names: list[tuple[str, ...]]  # for each prompt the names of its phrases, at most G


@dataclass(frozen=True)
class _Located:
    """The phrases of a prompt with their token positions."""

    names: tuple[str, ...]
    positions: tuple[frozenset[int], ...]
    truncated: tuple[str, ...]  # words without a token in any region
    empty: bool  # no core content: all tokens of the prompt are selected


def select_tokens(
    prompts: Sequence[str | Core],
    regions: Sequence[TextRegion],
    *,
    source: Source = "auto",
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    per_phrase: bool = False,
    weight: str = "token",
) -> PromptSelection:
    """Selects the tokens of the core content of a batch of prompts, as positions of the text.

    Args:
        prompts: a prompt, or a :class:`Core` to choose its core content yourself, for each sample of the batch.
        regions: the positions of the text encoders' tokens, from :func:`regions_of`.
        source: how the core content is found, see :func:`core_content`.
        metadata: for each prompt a line of a GenEval prompt file, or None.
        per_phrase: if False, the whole core content is aggregated into one map (G = 1). If True, each phrase has its
            own map: G is the largest number of phrases in a prompt, and prompts with fewer phrases have empty ones at
            the end.
        weight: "token": each token has weight one, so that a map is the attention mass on its tokens. "phrase": the
            tokens of a phrase share a weight of one, so that long and short phrases count alike.

    Returns:
        The selection, on the CPU, and for each prompt the names of its phrases (of its one map if not ``per_phrase``).
        Position 0 is the first token of the text; captures add where the text starts among the keys of their model. If
        text is padded on the left, capturing a pass whose text has another length is an error.

    Warns:
        Once for words that are truncated in every region. Once for prompts without core content, or whose core content
        is truncated entirely: all their tokens are selected, except special and padding tokens.

    Example:
        >>> selection, names = select_tokens(prompts, regions_of(pipeline))
        >>> with capture_maps(pipeline.transformer, selection.to(device)) as maps: ...
    """
    _check(prompts, regions, metadata, per_phrase, weight)
    lines = metadata or [None] * len(prompts)
    # The samples of a GRPO group share their prompt and metadata, which are processed once.
    keys = [(prompt, id(line)) for prompt, line in zip(prompts, lines, strict=True)]
    cores = {
        key: key[0] if isinstance(key[0], Core) else core_content(key[0], source, metadata=line)
        for key, line in dict(zip(keys, lines, strict=True)).items()
    }
    located = {core: _locate(core, regions) for core in dict.fromkeys(cores.values())}
    samples = [located[cores[key]] for key in keys]
    _warn(samples, regions)
    built = _build(list(located.values()), per_phrase, weight == "phrase")
    number = {core: i for i, core in enumerate(located)}
    of_sample = torch.tensor([number[cores[key]] for key in keys], device="cpu")
    names = [sample.names if per_phrase else (", ".join(sample.names),) for sample in samples]
    selection = TokenSelection(built.index[of_sample], built.weight[of_sample], _text_length(regions))
    return PromptSelection(selection, names)


def _locate(core: Core, regions: Sequence[TextRegion]) -> _Located:
    characters = [region.characters(core.prompt) for region in regions]
    positions_of = {
        span: frozenset(
            region.start + position
            for region, spans in zip(regions, characters, strict=True)
            for position in matching(core.prompt, spans, span)
        )
        for span in core.spans
    }
    truncated = tuple(core.prompt[start:stop] for start, stop in core.spans if not positions_of[start, stop])
    if len(truncated) < len(positions_of):
        positions = tuple(frozenset().union(*(positions_of[span] for span in phrase.spans)) for phrase in core.phrases)
        return _Located(core.names, positions, truncated, empty=False)
    everything = frozenset(
        region.start + position
        for region, spans in zip(regions, characters, strict=True)
        for position, span in enumerate(spans)
        if span != NOTHING
    )
    return _Located((core.prompt,), (everything,), truncated, empty=True)


def _build(located: Sequence[_Located], per_phrase: bool, shared: bool) -> TokenSelection:
    """A selection with a slot for each distinct position of a prompt."""
    selected = [sorted(frozenset().union(*prompt.positions)) for prompt in located]
    slots = max(1, max(map(len, selected)))
    n_phrases = max(len(prompt.positions) for prompt in located) if per_phrase else 1
    index = torch.full((len(located), slots), EMPTY, dtype=torch.int32, device="cpu")
    weight = torch.zeros(len(located), n_phrases, slots, dtype=torch.float32, device="cpu")
    for b, (prompt, of_prompt) in enumerate(zip(located, selected, strict=True)):
        index[b, : len(of_prompt)] = torch.tensor(of_prompt, dtype=torch.int32, device="cpu")
        for p, positions in enumerate(prompt.positions):
            in_phrase = [position in positions for position in of_prompt] + [False] * (slots - len(of_prompt))
            mask = torch.tensor(in_phrase, device="cpu")
            weights = weight[b, p if per_phrase else 0]
            if shared:
                weights += mask / max(1, len(positions))
            else:
                weights.masked_fill_(mask, 1.0)
    return TokenSelection(index, weight)


def _text_length(regions: Sequence[TextRegion]) -> int | None:
    """The length of the text, if positions depend on it."""
    return max((region.start + region.length for region in regions if region.padded_left), default=None)


def _warn(located: Sequence[_Located], regions: Sequence[TextRegion]) -> None:
    limits = ", ".join(f"{region.length} tokens of {region.name}" for region in regions)
    truncated = list(dict.fromkeys(word for sample in located for word in sample.truncated))
    if truncated:
        warnings.warn(f"{quoted(truncated)}: truncated in every region ({limits}), so not selected", stacklevel=3)
    empty = list(dict.fromkeys(sample.names[0] for sample in located if sample.empty))
    if empty:
        warnings.warn(f"no core content, so all tokens of the prompt are selected: {quoted(empty)}", stacklevel=3)


def _check(prompts: object, regions: object, metadata: object, per_phrase: bool, weight: str) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts must be a non-empty list with an entry for each sample, got {prompts!r}")
    for b, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Core)):
            raise TypeError(f"prompts must be strings or Cores, got {type(prompt).__name__} as prompts[{b}]")
    if not isinstance(regions, Sequence) or not regions or not all(isinstance(r, TextRegion) for r in regions):
        shown = repr(regions) if isinstance(regions, Sequence) else type(regions).__name__
        raise TypeError(f"regions must be a non-empty list of TextRegion, from regions_of(pipeline), got {shown}")
    if metadata is not None and (not isinstance(metadata, Sequence) or len(metadata) != len(prompts)):
        got = len(metadata) if isinstance(metadata, Sequence) else type(metadata).__name__
        raise ValueError(f"metadata must be a list with an entry for each of the {len(prompts)} prompts, got {got}")
    check_flag("per_phrase", per_phrase)
    if weight not in _WEIGHTS:
        raise ValueError(f"weight must be {' or '.join(map(repr, _WEIGHTS))}, got {weight!r}")
