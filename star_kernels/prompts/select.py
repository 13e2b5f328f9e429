"""From a batch of prompts to a TokenSelection, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from star_kernels.prompts.content import Source, core_content
from star_kernels.prompts.core import Core
from star_kernels.prompts.tokens import NOTHING, TextRegion, matching, quoted
from star_kernels.selection import EMPTY, TokenSelection

_GROUPS = ("all", "phrase")
_WEIGHTS = ("token", "phrase")


class PromptSelection(NamedTuple):
    """The selected tokens of a batch of prompts, and what each group of each prompt is."""

    selection: TokenSelection
    names: list[tuple[str, ...]]  # a name for each group that the prompt has, at most G


@dataclass(frozen=True)
class _Located:
    """One prompt's phrases with their positions in the joint sequence."""

    names: tuple[str, ...]
    positions: tuple[frozenset[int], ...]
    lost: tuple[str, ...]  # words without a token in any region
    empty: bool


def select_tokens(
    prompts: Sequence[str | Core],
    regions: Sequence[TextRegion],
    *,
    source: Source = "auto",
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    groups: str = "all",
    weight: str = "token",
    image_tokens: int | None = None,
) -> PromptSelection:
    """Selects the tokens of the core content of a batch of prompts, in the joint sequence of image and text.

    Args:
        prompts: one for each sample of the batch; a :class:`Core` brings its own core content.
        regions: where the text encoders' tokens stand, from :func:`regions_of`.
        source: where the core content comes from, see :func:`core_content`.
        metadata: for each prompt a line of GenEval's file, or None.
        groups: "all", one group for the whole core content, or "phrase", one for each phrase; G is then the largest
            number of phrases of a prompt, and the last groups of prompts with fewer are empty.
        weight: "token", each token weighs one, so that a map is the attention mass on the group; or "phrase", the
            tokens of a phrase share a weight of one, so that long phrases weigh no more than short ones.
        image_tokens: how many tokens the image has, (height / 16) * (width / 16) of its pixels for SD3; needed where
            the image comes before the text, without effect where it comes after.

    Returns:
        The selection, on the CPU, and the names of its groups. Its ``text`` says where the text stands, so that a
        capture refuses an image of another size, or a text padded to another length where that moves its tokens.

    Warns:
        Once for words that truncation leaves without a token in every region. Once for prompts without core content, or
        of which truncation leaves none: all tokens of the prompt count for them, special and padding tokens excepted.

    Example:
        >>> selection, names = select_tokens(prompts, regions_of(pipeline), image_tokens=1024)
        >>> with capture_maps(pipeline.transformer, selection.to(device)) as maps: ...
    """
    _check(prompts, regions, metadata, groups, weight)
    offsets = _offsets(regions, image_tokens)
    lines = metadata or [None] * len(prompts)
    # The samples of a group share a prompt and its line: whatever is found is found once.
    keys = [(prompt, id(line)) for prompt, line in zip(prompts, lines, strict=True)]
    cores = {
        key: key[0] if isinstance(key[0], Core) else core_content(key[0], source, metadata=line)
        for key, line in dict(zip(keys, lines, strict=True)).items()
    }
    located = {core: _locate(core, regions, offsets) for core in dict.fromkeys(cores.values())}
    samples = [located[cores[key]] for key in keys]
    _warn(samples, regions)
    built = _build(list(located.values()), groups == "phrase", weight == "phrase")
    places = {core: place for place, core in enumerate(located)}
    rows = torch.tensor([places[cores[key]] for key in keys], device="cpu")
    names = [sample.names if groups == "phrase" else (", ".join(sample.names),) for sample in samples]
    text = _text(regions, image_tokens)
    return PromptSelection(TokenSelection(built.index[rows], built.weight[rows], text), names)


def _locate(core: Core, regions: Sequence[TextRegion], offsets: Sequence[int]) -> _Located:
    characters = [region.characters(core.prompt) for region in regions]
    at = {
        span: frozenset(
            offset + position
            for offset, spans in zip(offsets, characters, strict=True)
            for position in matching(core.prompt, spans, span)
        )
        for span in core.spans
    }
    lost = tuple(core.prompt[start:stop] for start, stop in core.spans if not at[start, stop])
    if len(lost) < len(at):
        positions = tuple(frozenset().union(*(at[span] for span in phrase.spans)) for phrase in core.phrases)
        return _Located(core.names, positions, lost, empty=False)
    everything = frozenset(
        offset + position
        for offset, spans in zip(offsets, characters, strict=True)
        for position, span in enumerate(spans)
        if span != NOTHING
    )
    return _Located((core.prompt,), (everything,), lost, empty=True)


def _build(located: Sequence[_Located], by_phrase: bool, share: bool) -> TokenSelection:
    """Index and weight of the positions, each once for a prompt."""
    slots = [sorted(frozenset().union(*sample.positions)) for sample in located]
    width = max(1, max(map(len, slots)))
    groups = max(len(sample.positions) for sample in located) if by_phrase else 1
    index = torch.full((len(located), width), EMPTY, dtype=torch.int32, device="cpu")
    weight = torch.zeros(len(located), groups, width, dtype=torch.float32, device="cpu")
    for b, (sample, row) in enumerate(zip(located, slots, strict=True)):
        index[b, : len(row)] = torch.tensor(row, dtype=torch.int32, device="cpu")
        for p, positions in enumerate(sample.positions):
            among = [position in positions for position in row] + [False] * (width - len(row))
            chosen = torch.tensor(among, device="cpu")
            group = weight[b, p if by_phrase else 0]
            if share:
                group += chosen / max(1, len(positions))
            else:
                group.masked_fill_(chosen, 1.0)
    return TokenSelection(index, weight)


def _offsets(regions: Sequence[TextRegion], image_tokens: int | None) -> list[int]:
    """The first position of each region in the joint sequence."""
    after_image = [region.name for region in regions if region.after_image]
    good = image_tokens is None if not after_image else False
    good = good or (isinstance(image_tokens, int) and not isinstance(image_tokens, bool) and image_tokens >= 1)
    if not good:
        why = f", as {', '.join(after_image)} follow the image" if after_image else " or None"
        raise ValueError(f"image_tokens must be an integer of at least 1{why}, got {image_tokens!r}")
    return [region.start + (image_tokens or 0 if region.after_image else 0) for region in regions]


def _text(regions: Sequence[TextRegion], image_tokens: int | None) -> tuple[int, int | None] | None:
    """Where the text stands in the joint sequence, and its length where positions depend on it."""
    starts = {image_tokens or 0 if region.after_image else 0 for region in regions}
    lengths = [region.start + region.length for region in regions if region.padded_left]
    return (starts.pop(), max(lengths, default=None)) if len(starts) == 1 else None


def _warn(located: Sequence[_Located], regions: Sequence[TextRegion]) -> None:
    limits = ", ".join(f"{region.length} of {region.name}" for region in regions)
    lost = list(dict.fromkeys(word for sample in located for word in sample.lost))
    if lost:
        warnings.warn(f"{quoted(lost)}: no token within the limits ({limits}); left out", stacklevel=3)
    empty = list(dict.fromkeys(sample.names[0] for sample in located if sample.empty))
    if empty:
        warnings.warn(f"no core content, so that all tokens of the prompt count: {quoted(empty)}", stacklevel=3)


def _check(prompts: object, regions: object, metadata: object, groups: str, weight: str) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts must be a non-empty list, one for each sample, got {prompts!r}")
    for b, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Core)):
            raise TypeError(f"prompts must be strings or Cores, prompts[{b}] is {type(prompt).__name__}")
    if not isinstance(regions, Sequence) or not regions or not all(isinstance(r, TextRegion) for r in regions):
        raise TypeError(f"regions must be a non-empty list of TextRegion, from regions_of, got {regions!r}")
    if metadata is not None and (not isinstance(metadata, Sequence) or len(metadata) != len(prompts)):
        got = len(metadata) if isinstance(metadata, Sequence) else type(metadata).__name__
        raise ValueError(f"metadata must be a list with an entry for each of the {len(prompts)} prompts, got {got}")
    if groups not in _GROUPS:
        raise ValueError(f"groups must be {' or '.join(map(repr, _GROUPS))}, got {groups!r}")
    if weight not in _WEIGHTS:
        raise ValueError(f"weight must be {' or '.join(map(repr, _WEIGHTS))}, got {weight!r}")
