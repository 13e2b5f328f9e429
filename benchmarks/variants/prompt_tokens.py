"""Prompts from a file, and a real tokenizer for them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from star_trainer.textfile import read_lines

DEFAULT_PROMPTS = (
    'A noodle cart at dusk under a neon sign that reads "Fresh Broth Daily", steam rising over wet cobblestones',
    "a red bicycle leaning against a yellow wall",
    'The window of a bookshop with the words "Open Late" painted in gold letters, rain running down the glass',
    "two glass teapots beside a blue clock",
)


class PromptError(ValueError):
    """A prompt file or tokenizer that cannot be used; the message names it."""


def read_prompts(path: Path | None) -> list[str]:
    """A prompt a line, or GenEval's JSON lines with a "prompt" key; the built-in ones without a file."""
    if path is None:
        return list(DEFAULT_PROMPTS)
    try:
        lines = read_lines(path)
    except OSError as error:
        raise PromptError(f"--prompts: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise PromptError(f"--prompts: {error}") from error
    as_json = path.suffix.lower() in (".jsonl", ".json") or (bool(lines) and lines[0][1].startswith("{"))
    prompts = [_json_prompt(line, path, number) if as_json else line for number, line in lines]
    if not prompts:
        raise PromptError(f"--prompts: {path} holds no prompts; one a line is expected")
    return prompts


def load_tokenizer(path: Path | None, prompts: list[str]) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a local folder, or a small byte-level BPE trained on the prompts."""
    if path is None:
        return _train(prompts)
    if not path.is_dir():
        raise PromptError(f"--tokenizer: {path} is not a folder; one with a tokenizer.json is expected")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise PromptError(
            f"--tokenizer: no tokenizer could be loaded from {path}: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise PromptError(f"--tokenizer: {path} has no fast tokenizer, which the character offsets need")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise PromptError(f"--tokenizer: {path} has no token to pad with")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> list[list[int]]:
    """Token ids, padded to ``length``."""
    ids: list[list[int]] = tokenizer(prompts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return ids


def _json_prompt(line: str, path: Path, number: int) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PromptError(f'--prompts: {path}, line {number}: a JSON object with a "prompt" is expected') from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f'--prompts: {path}, line {number}: "prompt" must be text, got {prompt!r}')
    return prompt


def _train(prompts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(prompts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
