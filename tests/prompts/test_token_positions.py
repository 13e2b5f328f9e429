"""Token positions are exact for tokenizers that lower-case, normalise, merge spaces or split characters."""

from __future__ import annotations

import re
import unicodedata
import warnings
from typing import Any

import prompt_data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_tokenizers import KINDS, clip_tokenizer, qwen_tokenizer, t5_tokenizer

from star_kernels.prompts import Core, TextRegion, geneval, phrases, quoted_text, token_positions

LONG = 2048  # no prompt here is truncated
FORM = {"clip": "NFC", "t5": "NFKC", "qwen": "NFC"}
SPECIAL_BEFORE = {"clip": 1, "t5": 0, "qwen": 0}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def decoded(kind: str, prompt: str, positions: list[int]) -> str:
    tokenizer = KINDS[kind]()
    ids = tokenizer(prompt)["input_ids"]
    return "".join(tokenizer.decode([ids[p] for p in positions]).split())


def normal(kind: str, text: str) -> str:
    """A text as normalised by the tokenizer, without whitespace."""
    text = "".join(unicodedata.normalize(FORM[kind], text).split())
    return text.lower() if kind == "clip" else text


def is_core(kind: str, core: Core, text: str) -> bool:
    """Whether a text is the words of the core, with or without adjacent punctuation.

    Tokenizers may merge adjacent punctuation with that of the word: ``Back!"`` has the tokens ``back`` and ``!"``.
    """
    pattern = ""
    for start, stop in core.spans:
        before = re.search(r"[^\w\s]*$", core.prompt[:start])
        after = re.match(r"[^\w\s]*", core.prompt[stop:])
        assert before
        assert after
        word = re.escape(normal(kind, core.prompt[start:stop]))
        left = "".join(f"(?:{re.escape(c)})?" for c in before.group())
        right = "".join(f"(?:{re.escape(c)})?" for c in after.group())
        pattern += left + word + right
    return re.fullmatch(pattern, text) is not None


def joined(kind: str, cores: list[Core]) -> int:
    """The number of cores that end in a mark that the vocabulary merges with the closing quote."""
    return sum(core.words[-1].endswith("!") for core in cores) if kind != "t5" else 0


def check(kind: str, cores: list[Core]) -> int:
    """The number of cores whose tokens decode to exactly their words."""
    exact = 0
    for core in cores:
        text = decoded(kind, core.prompt, token_positions(KINDS[kind](), core.prompt, core.spans, length=LONG))
        assert is_core(kind, core, text), (core.prompt, text)
        exact += text == normal(kind, "".join(core.words))
    return exact


@kinds
def test_the_tokens_of_objects_decode_to_them(kind: str) -> None:
    cores = [geneval(prompt_data.compose(line)[0], line) for line in prompt_data.OBJECTS]
    assert check(kind, cores) == len(cores)


@kinds
def test_the_tokens_of_quoted_text_decode_to_it(kind: str) -> None:
    cores = [quoted_text(prompt) for prompt in prompt_data.WRITTEN]
    assert check(kind, cores) == len(cores) - joined(kind, cores) == len(cores) - (kind != "t5")


@kinds
def test_the_tokens_of_every_object_of_the_file_decode_to_it(kind: str) -> None:
    cores = [geneval(line["prompt"], line) for line in prompt_data.geneval_file()]
    assert check(kind, cores) == len(cores)


@kinds
def test_the_tokens_of_every_quoted_text_of_the_file_decode_to_it(kind: str) -> None:
    cores = [quoted_text(prompt) for prompt in prompt_data.ocr_file()]
    assert check(kind, cores) == len(cores) - joined(kind, cores)


@kinds
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_positions_agree_with_counting_the_tokens_of_words(kind: str, data: st.DataObject) -> None:
    """Without offsets: these tokenizers split at spaces, so the tokens of each word can be counted."""
    tokenizer = KINDS[kind]()
    words = data.draw(st.lists(st.sampled_from(["red", "bench", "Zyx", "naïve", "猫", "🐱", "3", "é"]), min_size=1))
    chosen = data.draw(st.sets(st.integers(0, len(words) - 1)))
    space = " " if kind == "qwen" else data.draw(st.sampled_from([" ", "  ", "\n "]))  # qwen keeps every space
    spans, expected, at, text = [], [], SPECIAL_BEFORE[kind], ""
    for w, word in enumerate(words):
        alone = (" " if kind == "qwen" and w else "") + word
        ids = tokenizer(alone, add_special_tokens=False)["input_ids"]
        space_alone = kind == "qwen" and tokenizer.decode(ids[:1]) == " "
        text += space if w else ""
        if w in chosen:
            spans.append((len(text), len(text) + len(word)))
            expected += range(at + space_alone, at + len(ids))
        at += len(ids)
        text += word
    assert token_positions(tokenizer, text, spans, length=LONG) == expected


@kinds
@pytest.mark.parametrize("word", ["猫", "🐱", "👩🏽‍🚀", "ш", "ी", "ﬁ", "½"])
def test_all_tokens_of_a_split_character_are_selected(kind: str, word: str) -> None:
    prompt = f"a {word} b"
    positions = token_positions(KINDS[kind](), prompt, [(2, 2 + len(word))], length=LONG)
    ids = KINDS[kind]()(prompt)["input_ids"]
    before = SPECIAL_BEFORE[kind] + 1 + (KINDS[kind]().decode(ids[1:2]) == " ")
    after = 1 if kind == "qwen" else 2
    assert positions == list(range(before, len(ids) - after))
    assert len(positions) >= 2 or kind == "t5"


@pytest.mark.parametrize("kind", ["clip", "qwen"])
def test_a_token_shared_with_adjacent_punctuation_belongs_to_the_word(kind: str) -> None:
    core = quoted_text('it says "Stop!" twice')
    positions = token_positions(KINDS[kind](), core.prompt, core.spans, length=LONG)
    assert decoded(kind, core.prompt, positions) == normal(kind, 'Stop!"')


def test_whitespace_is_not_part_of_a_word() -> None:
    tokenizer = qwen_tokenizer()
    assert token_positions(tokenizer, "red bench", [(0, 4)], length=9) == token_positions(
        tokenizer, "red bench", [(0, 3)], length=9
    )


def test_normalised_and_lower_cased_characters_keep_their_offsets() -> None:
    prompt = "İzmir  cafe\u0301 RED"
    for wanted in ("İzmir", "cafe\u0301", "RED"):
        core = phrases(prompt, [wanted])
        assert check("clip", [core]) == 1


@kinds
def test_a_partly_truncated_word_keeps_its_first_tokens(kind: str) -> None:
    tokenizer, prompt = KINDS[kind](), "red zyxwvut"
    whole = token_positions(tokenizer, prompt, [(4, 11)], length=LONG)
    assert len(whole) > 3
    special_after = 0 if kind == "qwen" else 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = token_positions(tokenizer, prompt, [(4, 11)], length=whole[2] + 1 + special_after)
    assert cut == whole[:3]


@kinds
def test_truncated_words_are_omitted_with_one_warning(kind: str) -> None:
    prompt = "red zyxwvut bench " + "lamp " * 40
    spans = [(0, 3), (12, 17), (prompt.rindex("lamp"), prompt.rindex("lamp") + 4)]
    with pytest.warns(UserWarning, match=r"'bench', 'lamp': truncated to 4 tokens by") as caught:
        positions = token_positions(KINDS[kind](), prompt, spans, length=4)
    assert [warning.filename for warning in caught] == [__file__]
    assert positions == token_positions(KINDS[kind](), prompt, spans[:1], length=4)


def test_left_padding_moves_the_positions() -> None:
    tokenizer, prompt, length = qwen_tokenizer("left"), "a red bench", 32
    ids = tokenizer(prompt, padding="max_length", max_length=length)["input_ids"]
    (position,) = token_positions(tokenizer, prompt, [(2, 5)], length=length)
    assert tokenizer.decode([ids[position]]) == " red"
    assert position > length // 2
    (unpadded,) = token_positions(tokenizer, prompt, [(2, 5)], length=length, padded=False)
    assert unpadded == 1


def test_a_prefix_shifts_positions_and_dropped_tokens_shift_them_back() -> None:
    tokenizer = qwen_tokenizer()
    (plain,) = token_positions(tokenizer, "a red bench", [(2, 5)], length=32)
    before = "<|im_start|>user\n"
    count = len(tokenizer(before)["input_ids"])
    layout: dict[str, Any] = {"prefix": before, "suffix": "<|im_end|>\n", "length": 32}
    assert token_positions(tokenizer, "a red bench", [(2, 5)], **layout) == [plain + count]
    assert token_positions(tokenizer, "a red bench", [(2, 5)], dropped=count, **layout) == [plain]


def test_the_same_word_in_the_template_is_not_selected() -> None:
    tokenizer = qwen_tokenizer()
    count = len(tokenizer("red: ")["input_ids"])
    assert token_positions(tokenizer, "red", [(0, 3)], length=16, prefix="red: ", suffix=" red")[0] >= count - 1
    region = TextRegion("x", tokenizer, 16, prefix="red: ", suffix=" red")
    assert {"red"[a:b] for a, b in region.characters("red") if b} <= {"red", "r", "e", "d", "re", "ed"}
    assert sum(b - a for a, b in region.characters("red")) == 3


def test_a_stripping_template_keeps_offsets_in_the_prompt() -> None:
    region = TextRegion("x", qwen_tokenizer(), 16, prefix="user\n", strips=True)
    prompt = "  red bench "
    assert "".join(prompt[a:b] for a, b in region.characters(prompt)) == "red bench"


def test_special_and_padding_tokens_have_empty_spans() -> None:
    for tokenizer in (clip_tokenizer(), t5_tokenizer()):
        ids = tokenizer("red", padding="max_length", max_length=8)["input_ids"]
        characters = TextRegion("x", tokenizer, 8).characters("red")
        assert [span != (0, 0) for span in characters] == [i not in tokenizer.all_special_ids for i in ids][
            : len(characters)
        ]


class Slow:
    is_fast = False

    def __call__(self, text: str) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("tokenizer", [Slow(), None, object()])
def test_a_slow_tokenizer_is_an_error_that_names_what_is_accepted(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match=r"tokenizer must be a fast tokenizer .* got (Slow|NoneType|object)"):
        token_positions(tokenizer, "red", [(0, 3)], length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be an integer of at least 1, got 0"),
        ({"length": 8, "start": -1}, "start must be an integer of at least 0, got -1"),
        ({"length": 8, "dropped": -1}, "dropped must be"),
    ],
)
def test_impossible_regions_are_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextRegion("x", clip_tokenizer(), **options)


def test_spans_outside_the_prompt_are_errors() -> None:
    with pytest.raises(ValueError, match=r"0 <= start < stop <= 3.* got \(0, 4\)"):
        token_positions(clip_tokenizer(), "red", [(0, 4)], length=8)
