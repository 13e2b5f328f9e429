"""All prompts of a run are checked before it begins: one that could not be used would end the run when it is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from star_kernels.prompts import core_content
from star_trainer.config import Allocation, Config
from star_trainer.prompts import Prompt
from star_trainer.rewards.base import PromptReward
from star_trainer.rewards.weighted import WeightedSum

Test = Callable[[Prompt], object]
_NAMED = 5  # lines in a message


def check_prompts(prompts: Sequence[Prompt], held_out: Sequence[Prompt], rewards: WeightedSum, config: Config) -> None:
    """Finds the prompts without the core content that the allocation needs, or that a reward cannot score.

    Args:
        prompts: for training.
        held_out: for evaluation, where only rewards look at them.

    Warns:
        RuntimeWarning: of prompts that a reward cannot score, with ``reward.on_failure`` "skip".

    Raises:
        ValueError: there are such prompts; the message names the file, the first of them and how many there are.
    """
    allocation, data = config.allocation, config.data
    scored = [_scoring(reward) for reward in rewards.rewards.values() if isinstance(reward, PromptReward)]
    if allocation.method == "star":
        found = failing(prompts, [lambda prompt: _find_core(prompt, allocation)])
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
    """What each prompt that fails a test raised, by its place in the list."""
    found: dict[int, Exception] = {}
    for place, prompt in enumerate(prompts):
        try:
            for test in tests:
                test(prompt)
        except (TypeError, ValueError) as error:
            found[place] = error
    return found


def _scoring(reward: PromptReward) -> Test:
    return lambda prompt: reward.check_prompt(prompt.text, prompt.metadata)


def _find_core(prompt: Prompt, allocation: Allocation) -> None:
    # Quotes and content words are looked for, and may be none; GenEval's words must be there.
    if allocation.source == "geneval" or "include" in prompt.metadata:
        core_content(prompt.text, allocation.source, metadata=prompt.metadata)


def _describe(found: dict[int, Exception], prompts: Sequence[Prompt], source: str) -> str:
    places = [f"{prompts[place].line or place + 1}" for place in found]
    first = f"{source}, line {places[0]}: {next(iter(found.values()))}"
    if len(places) == 1:
        return first
    more = ", ".join(places[1:_NAMED]) + (", ..." if len(places) > _NAMED else "")
    return f"{first}; {len(places) - 1} more of the {len(prompts)} prompts fail (lines {more})"
