"""Small tokenizers of the three kinds that text encoders use, trained here: CLIP, T5 and Qwen."""

from __future__ import annotations

import copy
import json
import string
from functools import cache
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizerFast, Qwen2TokenizerFast, T5TokenizerFast

CORPUS = (
    "a photo of a red bench and a blue teapot, two lanterns left of a wooden cart under the bright evening sky",
    'a neon sign that reads "Fresh Broth Daily" above the door of a small shop, steam rising in the background',
    "the realistic photograph shows a street with people, their faces lit by warm light, set against a dark wall",
    'the poster shouts "Stop!" and "Go!" and "Look!" at the people in the street, and "Now!" once more',
    "猫が赤いベンチに座る 一只红色的猫坐在长椅上 кошка на скамейке नमस्ते दुनिया",
)
END = "<|endoftext|>"
CHAT_ENDS = ("<|im_start|>", "<|im_end|>")


@cache
def clip_tokenizer() -> Any:
    """Byte-level BPE with end-of-word marks and lower-casing; a special token before and after; 77 positions."""
    kind = CLIPTokenizerFast().backend_tokenizer
    merges = _bpe_merges(kind.normalizer, kind.pre_tokenizer, end_of_word="</w>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges), "<|startoftext|>", END]
    return CLIPTokenizerFast(vocab=_numbered(pieces), merges=merges, model_max_length=77)


@cache
def t5_tokenizer() -> Any:
    """Unigram with NFKC normalisation and a mark for the space before a word; a special token after the text.

    As in T5's vocabulary, no piece mixes letters and punctuation.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = T5TokenizerFast().backend_tokenizer.pre_tokenizer
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation + "▁\u2044é\u2019"),
        show_progress=False,
    )
    spaced = ["".join(f" {c} " if c in string.punctuation else c for c in line) for line in CORPUS]
    tokenizer.train_from_iterator(spaced, trainer)
    vocab = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    result = T5TokenizerFast(vocab=vocab, extra_ids=0)
    result.backend_tokenizer.normalizer = tokenizer.normalizer
    return result


def qwen_tokenizer(padding_side: str = "right") -> Any:
    """Byte-level BPE whose tokens include the space before a word; special tokens come from the chat template only.

    A tokenizer of its own for each call, because some pipelines set the padding side.
    """
    return copy.deepcopy(_qwen_tokenizer(padding_side))


@cache
def _qwen_tokenizer(padding_side: str) -> Any:
    kind = Qwen2TokenizerFast().backend_tokenizer
    merges = _bpe_merges(kind.normalizer, kind.pre_tokenizer)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), END, *CHAT_ENDS]
    return Qwen2TokenizerFast(
        vocab=_numbered(pieces),
        merges=merges,
        additional_special_tokens=list(CHAT_ENDS),
        padding_side=padding_side,
        chat_template=QWEN_CHAT,
    )


QWEN_CHAT = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content }}{% else %}{{- message.content[0].text }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

KINDS = {"clip": clip_tokenizer, "t5": t5_tokenizer, "qwen": qwen_tokenizer}


def _bpe_merges(normalizer: Any, pre_tokenizer: Any, end_of_word: str = "") -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=end_of_word))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
