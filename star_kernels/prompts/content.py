"""core_content: finds the core content of a prompt with a chosen source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from star_kernels.prompts.core import Core, Span, check_prompt, check_span, core_of
from star_kernels.prompts.sources.geneval import geneval
from star_kernels.prompts.sources.phrases import phrases
from star_kernels.prompts.sources.quotes import quoted_text
from star_kernels.prompts.sources.words import content_words

Source = str | Sequence[str] | Callable[[str], Core | Iterable[str | Span]]
SOURCES = ("auto", "quoted", "words", "geneval")


def core_content(prompt: str, source: Source = "auto", *, metadata: Mapping[str, Any] | None = None) -> Core:
    """Finds the core content of a prompt: the phrases that it is about.

    Args:
        prompt: the text.
        source: how the core content is found:

            - "auto": from GenEval metadata if given, else quoted text if there is any, else content words;
            - "quoted": :func:`quoted_text`; "words": :func:`content_words`; "geneval": :func:`geneval`;
            - a list of strings: these :func:`phrases`;
            - a function of the prompt, such as a parser or a language model, that returns phrases of the prompt,
              (start, stop) character spans, or a :class:`Core`.
        metadata: a line of a GenEval prompt file; used by "geneval" and "auto".

    Raises:
        TypeError, ValueError: unknown source, or a function that returns anything else.
    """
    check_prompt(prompt)
    if callable(source):
        return _from_function(prompt, source(prompt))
    if not isinstance(source, str):
        return phrases(prompt, source)
    if source not in SOURCES:
        raise ValueError(
            f"source must be one of {', '.join(SOURCES)}, a list of phrases or a function, got {source!r} (a single "
            f"phrase is a list, too: [{source!r}])"
        )
    if source == "geneval" or (source == "auto" and metadata and "include" in metadata):
        if metadata is None:
            raise ValueError("metadata must be given for source='geneval', got None")
        return geneval(prompt, metadata)
    if source == "words":
        return content_words(prompt)
    quoted = quoted_text(prompt)
    return content_words(prompt) if source == "auto" and not quoted.phrases else quoted


def _from_function(prompt: str, result: object) -> Core:
    if isinstance(result, Core):
        if result.prompt != prompt:
            raise ValueError(f"source must return the Core of the prompt {prompt!r}, got that of {result.prompt!r}")
        return result
    if isinstance(result, str) or not isinstance(result, Iterable):
        raise TypeError(f"source must return a list of phrases or (start, stop) spans, or a Core, got {result!r}")
    found: list[tuple[str, Iterable[Span]]] = []
    for item in result:
        if isinstance(item, str):
            found += phrases(prompt, [item]).phrases
        elif isinstance(item, tuple) and len(item) == 2:
            check_span(item, prompt)
            found.append((prompt[item[0] : item[1]], [item]))
        else:
            raise TypeError(f"source must return phrases or (start, stop) spans, got a list with {item!r}")
    return core_of(prompt, found)
