"""Checks all prompts before a run begins, because an unusable one would end the run when it is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from star_trainer.config import Config
from star_trainer.prompts import Prompt
from star_trainer.rewards.base import PromptReward
from star_trainer.rewards.weighted import WeightedSum

Test = Callable[[Prompt], object]
_NAMED = 5  # maximum number of lines that a message names


def check_prompts(prompts: Sequence[Prompt], held_out: Sequence[Prompt], rewards: WeightedSum, config: Config) -> None:
    """Checks that each prompt has the core content that the allocation needs and that each reward can score it.

    Args:
        prompts: for training.
        held_out: for evaluation; only checked against the rewards.

    Warns:
        RuntimeWarning: with ``reward.on_failure`` "skip", prompts that a reward cannot score.

    Raises:
        ValueError: a prompt fails; the message names the file, the first failing line and the number of failures.
    """
    allocation, data = config.allocation, config.data
    scored = [_scoring(name, reward) for name, reward in rewards.rewards.items() if isinstance(reward, PromptReward)]
    if allocation.method == "star":
        found = failing(prompts, [_check_core])
        if found:
            raise ValueError(f"allocation.source {allocation.source!r}: {_describe(found, prompts, data.prompts)}")
    sources = [(data.prompts, prompts)]
    if config.evaluation.every and held_out != prompts:
        sources.append((data.eval_prompts or data.prompts, held_out))
    for source, chosen in sources:
        found = failing(chosen, scored)
        if found and config.reward.on_failure == "stop":
            raise ValueError(_describe(found, chosen, source))
        if found:
            text = f"{_describe(found, chosen, source)}; their samples will be skipped"
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def failing(prompts: Sequence[Prompt], tests: Sequence[Test]) -> dict[int, Exception]:
    """The exception of each prompt that fails a test, by its index."""
    found: dict[int, Exception] = {}
    for place, prompt in enumerate(prompts):
        try:
            for test in tests:
                test(prompt)
        except (TypeError, ValueError) as error:
            found[place] = error
    return found


def _scoring(name: str, reward: PromptReward) -> Test:
    def test(prompt: Prompt) -> None:
        try:
            reward.check_prompt(prompt.text, prompt.metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {name!r}: {error}") from error

    return test


def _check_core(prompt: Prompt) -> None:
    # Only GenEval's core content can be missing; without quotes or content words, all words of the prompt are used.
    if prompt.core_source == "geneval" or "include" in prompt.metadata:
        _ = prompt.core


def _describe(found: dict[int, Exception], prompts: Sequence[Prompt], source: str) -> str:
    places = [f"{prompts[place].line or place + 1}" for place in found]
    first = f"{source}, line {places[0]}: {next(iter(found.values()))}"
    if len(places) == 1:
        return first
    lines = "lines" if len(places) > 2 else "line"
    more = ", ".join(places[1:_NAMED]) + (", ..." if len(places) > _NAMED else "")
    return f"{first}; {len(places) - 1} more of the {len(prompts)} prompts fail ({lines} {more})"
