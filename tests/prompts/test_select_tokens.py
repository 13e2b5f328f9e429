"""select_tokens: from prompts and regions to a TokenSelection."""

from __future__ import annotations

import warnings
from typing import Any

import prompt_data
import pytest
import torch
from local_tokenizers import clip_tokenizer, t5_tokenizer

from star_kernels.prompts import Core, Phrase, TextRegion, phrases, select_tokens
from star_kernels.prompts.regions import flux_regions, sd3_regions


def sd3() -> list[TextRegion]:
    return sd3_regions(clip_tokenizer(), clip_tokenizer(), t5_tokenizer())


def positions(selection: Any, b: int, g: int = 0) -> list[int]:
    return [int(i) for i, w in zip(selection.index[b], selection.weight[b, g], strict=True) if w > 0]


def words_at(positions: list[int], prompt: str) -> list[str]:
    """The text that SD3's encoders have at positions of the text."""
    clip = clip_tokenizer()(prompt, padding="max_length", max_length=77)["input_ids"]
    t5 = t5_tokenizer()(prompt, padding="max_length", max_length=256)["input_ids"]
    return [
        clip_tokenizer().decode([clip[p] for p in positions if p < 77]),
        t5_tokenizer().decode([t5[p - 77] for p in positions if p >= 77]),
    ]


def test_clip_and_t5_positions_of_each_word_are_selected() -> None:
    prompts = ["a red bench", 'a sign that reads "bright evening" above the red bench']
    selection, names = select_tokens(prompts, sd3())
    assert words_at(positions(selection, 0), prompts[0]) == ["red bench"] * 2
    assert words_at(positions(selection, 1), prompts[1]) == ["bright evening"] * 2
    assert names == [("red bench",), ("bright evening",)]
    assert selection.phrases == 1
    assert set(selection.weight.unique().tolist()) <= {0.0, 1.0}


def test_a_position_shared_by_two_encoders_is_selected_once() -> None:
    alone, _ = select_tokens(["a red bench"], sd3()[:1])
    both, _ = select_tokens(["a red bench"], sd3()[:2])
    assert torch.equal(alone.index, both.index)
    assert torch.equal(alone.weight, both.weight)


def test_positions_shared_by_different_tokenizers_are_the_union_of_both() -> None:
    a, b = TextRegion("a", clip_tokenizer(), 77), TextRegion("b", t5_tokenizer(), 77)
    joined = {p for r in (a, b) for p in positions(select_tokens(["a red bench"], [r])[0], 0)}
    assert set(positions(select_tokens(["a red bench"], [a, b])[0], 0)) == joined
    assert len(joined) > 2


def test_every_occurrence_of_a_word_is_selected() -> None:
    prompt = "a red bench by a bench with a Bench"
    selection, _ = select_tokens([prompt], sd3(), source=["bench"])
    clip, t5 = words_at(positions(selection, 0), prompt)
    assert clip == "bench bench bench"
    assert t5.lower().replace(" ", "") == "benchbenchbench"


def test_prompts_with_fewer_phrases_have_empty_ones() -> None:
    prompts = ["a red bench and a blue teapot under the sky", "a bench"]
    selection, names = select_tokens(prompts, flux_regions(t5_tokenizer()), per_phrase=True)
    assert names == [("red bench", "blue teapot", "sky"), ("bench",)]
    assert selection.weight.shape[:2] == (2, 3)
    ids = [t5_tokenizer()(prompt)["input_ids"] for prompt in prompts]
    for b, sample in enumerate(names):
        for g, name in enumerate(sample):
            assert t5_tokenizer().decode([ids[b][p] for p in positions(selection, b, g)]) == name
    assert not selection.weight[1, 1:].any()


def test_a_token_of_two_phrases_is_in_both_and_counts_once_in_their_union() -> None:
    core = Core("a red bench", (Phrase("red bench", ((2, 5), (6, 11))), Phrase("bench", ((6, 11),))))
    by_phrase, _ = select_tokens([core], flux_regions(t5_tokenizer()), per_phrase=True)
    whole, _ = select_tokens([core], flux_regions(t5_tokenizer()))
    assert set(positions(by_phrase, 0, 1)) < set(positions(by_phrase, 0, 0))
    assert positions(whole, 0) == positions(by_phrase, 0, 0)
    assert whole.weight.max() == 1


def test_phrase_weights_sum_to_one() -> None:
    prompt = 'a "wooden zyxwvutsrq cart" and "red"'
    regions = flux_regions(t5_tokenizer())
    by_phrase, _ = select_tokens([prompt], regions, per_phrase=True, weight="phrase")
    torch.testing.assert_close(by_phrase.weight.sum(dim=-1), torch.ones(1, 2))
    whole, _ = select_tokens([prompt], regions, weight="phrase")
    torch.testing.assert_close(whole.weight.sum(), torch.tensor(2.0))
    torch.testing.assert_close(whole.weight, by_phrase.weight.sum(dim=1, keepdim=True))


def test_an_empty_core_selects_all_tokens_of_the_prompt_with_one_warning() -> None:
    prompts = ["of the and", "a red bench", "by the"]
    with pytest.warns(
        UserWarning, match="no core content, .* all tokens of the prompt are selected: 'of the and', 'by the'$"
    ) as w:
        selection, names = select_tokens(prompts, sd3(), source="words")
    assert len(w) == 1
    assert names == [("of the and",), ("red bench",), ("by the",)]
    clip, t5 = words_at(positions(selection, 0), prompts[0])
    assert (clip, t5) == ("of the and", "of the and")  # no special and no padding tokens


def test_an_empty_prompt_selects_nothing() -> None:
    with pytest.warns(UserWarning, match="no core content"):
        selection, names = select_tokens([""], sd3())
    assert positions(selection, 0) == []
    assert names == [("",)]


def test_a_word_truncated_by_clip_is_selected_in_t5_without_a_warning() -> None:
    prompt = "the " * 90 + "bench"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection, _ = select_tokens([prompt], sd3(), source=["bench"])
    assert min(positions(selection, 0)) >= 77


def test_a_word_truncated_in_every_region_is_omitted_with_one_warning() -> None:
    prompt = "red " + "owl " * 400 + "bench"
    with pytest.warns(UserWarning, match="not selected") as caught:
        selection, names = select_tokens([prompt] * 2, sd3(), source=["red", "bench"], per_phrase=True)
    assert [str(w.message) for w in caught] == [
        "'bench': truncated in every region (77 tokens of clip_l, 77 tokens of clip_g, 256 tokens of t5), "
        "so not selected"
    ]
    assert caught[0].filename == __file__
    assert names[0] == ("red", "bench")
    assert positions(selection, 0, 0)
    assert not positions(selection, 0, 1)


def test_a_core_that_is_truncated_entirely_counts_as_empty() -> None:
    prompt = "owl " * 400 + "bench"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selection, _ = select_tokens([prompt], sd3(), source=["bench"])
    assert [str(w.message).partition(":")[0] for w in caught] == [
        "'bench'",
        "no core content, so all tokens of the prompt are selected",
    ]
    assert len(positions(selection, 0)) == 75 + 255


def test_each_prompt_may_have_its_own_metadata_or_core() -> None:
    lines = [line for line in prompt_data.OBJECTS if line["tag"] == "position"][:2]
    prompts = [prompt_data.compose(line)[0] for line in lines]
    _, names = select_tokens(prompts, sd3(), metadata=lines, per_phrase=True)
    assert names == [("igloo", "lantern", "left of"), ("fly", "butter fly", "below")]
    _, names = select_tokens([phrases("a red owl", ["owl"]), "a red owl"], sd3())
    assert names == [("owl",), ("red owl",)]


def test_samples_of_one_prompt_have_equal_selections() -> None:
    selection, _ = select_tokens(["a red bench"] * 2, sd3())
    assert selection.batch == 2
    assert selection.index.dtype == torch.int32
    assert torch.equal(selection.index[0], selection.index[1])
    assert selection.last < 333


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": "a red owl"}, ValueError, "prompts must be a non-empty list"),
        ({"prompts": []}, ValueError, "prompts must be a non-empty list"),
        ({"prompts": ["a", 3]}, TypeError, r"got int as prompts\[1\]"),
        ({"regions": []}, TypeError, "regions must be a non-empty list of TextRegion"),
        ({"regions": [3]}, TypeError, "regions must be a non-empty list of TextRegion"),
        ({"regions": object()}, TypeError, r"TextRegion, from regions_of\(pipeline\), got object$"),
        (
            {"metadata": [None] * 2},
            ValueError,
            "metadata must be a list with an entry for each of the 1 prompts, got 2",
        ),
        ({"per_phrase": "word"}, TypeError, "per_phrase must be True or False, got 'word'"),
        ({"weight": 1.0}, ValueError, "weight must be 'token' or 'phrase', got 1.0"),
        ({"source": "nouns"}, ValueError, "source must be one of"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"prompts": ["a red owl"], "regions": sd3()} | change
    with pytest.raises(error, match=message):
        select_tokens(arguments.pop("prompts"), arguments.pop("regions"), **arguments)


def test_the_default_dtype_and_device_do_not_matter() -> None:
    expected, _ = select_tokens(["a red owl", "a cat"], sd3(), weight="phrase")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            selection, _ = select_tokens(["a red owl", "a cat"], sd3(), weight="phrase")
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(selection.index, expected.index)
    assert torch.equal(selection.weight, expected.weight)
