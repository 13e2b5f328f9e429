"""Chooses the source of a prompt's core content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from star_kernels.prompts.core import Core, Span, check_prompt, check_span, core_of
from star_kernels.prompts.sources.geneval import geneval
from star_kernels.prompts.sources.phrases import phrases
from star_kernels.prompts.sources.quotes import quoted_text
from star_kernels.prompts.sources.words import content_words

Hook = Callable[[str], Core | Iterable[str | Span]]
Source = str | Sequence[str] | Hook
SOURCES = ("auto", "quoted", "words", "geneval")


def core_content(prompt: str, source: Source = "auto", *, metadata: Mapping[str, Any] | None = None) -> Core:
    """What a prompt is about.

    Args:
        prompt: the text.
        source: where the core content comes from:

            - "auto": GenEval metadata if there is any, else quoted text if there is any, else content words;
            - "quoted": :func:`quoted_text`; "words": :func:`content_words`; "geneval": :func:`geneval`;
            - a list of strings: these :func:`phrases`;
            - a function of the prompt, say a parser or a language model: it returns phrases of the prompt, or
              (start, stop) characters, or a :class:`Core`.
        metadata: a line of GenEval's file; for "geneval" and "auto".

    Raises:
        TypeError, ValueError: an unknown source, or a function that returns something else than the above.
    """
    check_prompt(prompt)
    if callable(source):
        return _from_hook(prompt, source(prompt))
    if not isinstance(source, str):
        return phrases(prompt, source)
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, a list of phrases or a function, got {source!r}")
    if source == "geneval" or (source == "auto" and metadata and "include" in metadata):
        if metadata is None:
            raise ValueError("metadata must be given for source='geneval', got None")
        return geneval(prompt, metadata)
    if source == "words":
        return content_words(prompt)
    quoted = quoted_text(prompt)
    return content_words(prompt) if source == "auto" and not quoted.phrases else quoted


def _from_hook(prompt: str, answer: object) -> Core:
    if isinstance(answer, Core):
        if answer.prompt != prompt:
            raise ValueError(f"source must return the core of the prompt {prompt!r}, got one of {answer.prompt!r}")
        return answer
    if isinstance(answer, str) or not isinstance(answer, Iterable):
        raise TypeError(f"source must return a list of phrases or of (start, stop), or a Core, got {answer!r}")
    found: list[tuple[str, Iterable[Span]]] = []
    for item in answer:
        if isinstance(item, str):
            found += phrases(prompt, [item]).phrases
        elif isinstance(item, tuple) and len(item) == 2:
            check_span(item, prompt)
            found.append((prompt[item[0] : item[1]], [item]))
        else:
            raise TypeError(f"source must return phrases or (start, stop), got {item!r} among them")
    return core_of(prompt, found)
