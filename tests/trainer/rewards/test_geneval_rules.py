"""GenEval's rules for given detections: counting, positions, GenEval's verdict and Flow-GRPO's grade."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from star_trainer.rewards.geneval.rules import Box, Detection, Objects, grade, judge, keep, overlap, relations
from star_trainer.rewards.geneval.task import read_task

MIDDLE: Box = (40, 40, 60, 60)
LEFT: Box = (0, 40, 20, 60)
RIGHT: Box = (80, 40, 100, 60)
ABOVE: Box = (40, 0, 60, 20)
BELOW: Box = (40, 80, 60, 100)


def at(box: Box = MIDDLE, score: float = 0.9) -> Detection:
    return Detection(box, score)


def no_colors(found: Sequence[Detection], noun: str) -> list[str]:
    raise AssertionError("no colour is asked for")


def colors(*names: str):
    """A classifier that returns these colours for the detections of any class, in order."""
    return lambda found, noun: list(names[: len(found)])


def task(*include: dict[str, object], exclude: Sequence[dict[str, object]] = ()):
    return read_task({"tag": "test", "include": list(include), "exclude": list(exclude)})


def asked(noun: str = "dog", count: int = 1, **more: object) -> dict[str, object]:
    return {"class": noun, "count": count, **more}


def test_detections_above_the_threshold_are_ordered_by_confidence() -> None:
    found = [at(score=score) for score in (0.3, 0.95, 0.31, 0.1, 0.9)]
    assert [d.score for d in keep(found)] == [0.95, 0.9, 0.31]
    assert [d.score for d in keep(found, threshold=0.9)] == [0.95]


def test_at_most_max_objects_count() -> None:
    found = [at(score=0.4 + i / 100) for i in range(20)]
    assert [d.score for d in keep(found)] == sorted((d.score for d in found), reverse=True)[:16]
    assert len(keep(found, max_objects=2)) == 2


def test_overlapping_boxes_are_all_kept_unless_max_overlap_is_lower() -> None:
    first, same, beside = at(score=0.9), at(score=0.8), at(RIGHT, 0.7)
    assert keep([first, same, beside]) == [first, same, beside]
    assert keep([same, beside, first], max_overlap=0.5) == [first, beside]
    assert keep([first, same], max_overlap=0.99) == [first]


def test_a_box_that_only_overlaps_a_removed_box_is_kept() -> None:
    first, second, third = at((0, 0, 99, 99), 0.9), at((40, 0, 139, 99), 0.8), at((80, 0, 179, 99), 0.7)
    assert keep([first, second, third], max_overlap=0.4) == [first, third]


def test_overlap_counts_the_last_pixel() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (9, 9, 18, 18)) == pytest.approx(1 / 199)
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0
    assert overlap((0, 0, -1, -1), (0, 0, -1, -1)) == 0


@pytest.mark.parametrize(
    ("box", "expected"), [(LEFT, "left of"), (RIGHT, "right of"), (ABOVE, "above"), (BELOW, "below")]
)
def test_a_relation_is_the_side_on_which_the_first_box_is(box: Box, expected: str) -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(box, MIDDLE) == {expected}
    assert relations(MIDDLE, box) == {opposite[expected]}


def test_on_a_diagonal_two_relations_hold() -> None:
    assert relations((0, 0, 2, 2), (100, 100, 102, 102)) == {"left of", "above"}


def test_off_the_diagonal_only_the_longer_axis_counts() -> None:
    # 30 degrees: the shorter part is half of the offset, less the threshold, and so not beyond half
    assert relations((173, 100, 175, 102), (0, 0, 2, 2)) == {"right of"}


def test_the_same_place_has_no_relation() -> None:
    assert relations(MIDDLE, MIDDLE) == set()
    assert relations((40, 40, 60, 60), (35, 35, 65, 65)) == set()


@pytest.mark.parametrize(("offset", "holds"), [(3.9, False), (4.1, False), (8.1, True), (-8.1, False)])
def test_an_offset_counts_beyond_a_tenth_of_both_sizes(offset: float, holds: bool) -> None:
    # both are 20 wide: the first 4 pixels do not count, and what is left must be more than half of the offset
    moved = (40 + offset, 40.0, 60 + offset, 60.0)
    assert ("right of" in relations(moved, MIDDLE)) == holds
    assert ("right of" in relations(moved, MIDDLE, threshold=0.0)) == (offset > 0)


def test_more_objects_than_required_are_correct() -> None:
    assert judge({"dog": [at()]}, task(asked()), no_colors).correct
    assert judge({"dog": [at()] * 3}, task(asked()), no_colors).correct


def test_too_few_objects_are_wrong_with_a_reason() -> None:
    verdict = judge({"dog": [at()]}, task(asked(count=2)), no_colors)
    assert (verdict.correct, verdict.score) == (False, 0.0)
    assert verdict.reasons == ("expected dog>=2, found 1",)


def test_an_excluded_count_is_wrong_from_that_count_on() -> None:
    two = task(asked(count=2), exclude=[asked(count=3)])
    assert judge({"dog": [at()] * 2}, two, no_colors).correct
    verdict = judge({"dog": [at()] * 3}, two, no_colors)
    assert not verdict.correct
    assert verdict.reasons == ("expected dog<3, found 3",)


def test_an_excluded_class_may_be_alone() -> None:
    none = read_task({"exclude": [asked("cat")]})
    assert judge({}, none, no_colors).correct
    assert not judge({"cat": [at()]}, none, no_colors).correct


def test_every_entry_must_hold() -> None:
    both = task(asked("dog"), asked("cat"))
    assert judge({"dog": [at()], "cat": [at()]}, both, no_colors).correct
    for seen in ({"dog": [at()]}, {"cat": [at()]}, {}):
        assert not judge(seen, both, no_colors).correct


def test_the_color_is_that_of_the_most_confident_objects() -> None:
    red = task(asked(color="red"))
    two = {"dog": [at(), at(LEFT, 0.5)]}
    assert judge(two, red, colors("red", "blue")).correct
    verdict = judge(two, red, colors("blue", "red"))
    assert not verdict.correct
    assert verdict.reasons == ("expected red dog>=1, found 1 blue",)


def test_colors_are_only_classified_for_the_required_objects() -> None:
    asked_for: list[tuple[int, str]] = []

    def remember(found: Sequence[Detection], noun: str) -> list[str]:
        asked_for.append((len(found), noun))
        return ["red"] * len(found)

    judge({"dog": [at()] * 4}, task(asked(count=2, color="red"), asked("cat", color="red")), remember)
    assert asked_for == [(2, "dog")]  # there is no cat


def test_all_objects_must_have_the_color() -> None:
    two = task(asked(count=2, color="red"))
    assert not judge({"dog": [at(), at()]}, two, colors("red", "blue")).correct
    assert judge({"dog": [at(), at()]}, two, colors("red", "red")).correct


def test_a_position_refers_to_the_entry_before() -> None:
    right = task(asked("cat"), asked("dog", position=["right of", 0]))
    assert judge({"cat": [at()], "dog": [at(RIGHT)]}, right, no_colors).correct
    verdict = judge({"cat": [at()], "dog": [at(LEFT)]}, right, no_colors)
    assert verdict.reasons == ("expected dog right of target, found left of",)
    assert judge({"cat": [at()], "dog": [at()]}, right, no_colors).reasons[0].endswith("found neither")


def test_a_position_counts_the_most_confident_object_only() -> None:
    right = task(asked("cat"), asked("dog", position=["right of", 0]))
    assert judge({"cat": [at()], "dog": [at(RIGHT), at(LEFT)]}, right, no_colors).correct
    assert not judge({"cat": [at()], "dog": [at(LEFT), at(RIGHT)]}, right, no_colors).correct


def test_a_position_holds_for_every_pair() -> None:
    right = task(asked("cat", count=2), asked("dog", count=2, position=["right of", 0]))
    cats = [at(LEFT), at()]
    assert judge({"cat": cats, "dog": [at(RIGHT), at((90, 40, 99, 60))]}, right, no_colors).correct
    assert not judge({"cat": cats, "dog": [at(RIGHT), at((25, 40, 35, 60))]}, right, no_colors).correct


def test_a_position_towards_an_entry_that_fails_is_wrong() -> None:
    right = task(asked("cat", color="red"), asked("dog", position=["right of", 0]))
    seen: Objects = {"cat": [at()], "dog": [at(RIGHT)]}
    assert judge(seen, right, colors("red")).correct
    assert judge(seen, right, colors("blue")).reasons[-1] == "no target for dog to be right of"


def test_a_position_may_refer_to_any_entry_before_it() -> None:
    chain = task(asked("cat"), asked("bird"), asked("dog", position=["above", 1]))
    seen: Objects = {"cat": [at(ABOVE)], "bird": [at()], "dog": [at(ABOVE)]}
    assert judge(seen, chain, no_colors).correct
    assert not judge({**seen, "bird": [at((40, 0, 60, 5))]}, chain, no_colors).correct


@pytest.mark.parametrize(("found", "score"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0), (5, -0.5)])
def test_the_grade_of_a_count_falls_with_the_distance_to_it(found: int, score: float) -> None:
    verdict = grade({"dog": [at()] * found}, task(asked(count=2)), no_colors)
    assert verdict.score == score
    assert verdict.correct == (found == 2)


def test_the_grade_is_the_mean_over_conditions() -> None:
    both = task(asked("dog"), asked("cat"))
    assert grade({"dog": [at()], "cat": [at()]}, both, no_colors).score == 1
    assert grade({"dog": [at()]}, both, no_colors).score == 0.5


def test_the_grade_of_colors_is_the_share_that_is_right() -> None:
    two = task(asked(count=2, color="red"))
    seen: Objects = {"dog": [at(), at()]}
    assert grade(seen, two, colors("red", "red")).score == 1
    assert grade(seen, two, colors("red", "blue")).score == 0.75
    assert grade(seen, two, colors("blue", "blue")).score == 0.5


def test_with_a_wrong_count_color_and_position_have_one_term_of_zero() -> None:
    assert grade({}, task(asked(color="red")), no_colors).score == 0
    assert grade({"dog": [at()] * 3}, task(asked(count=2, color="red")), no_colors).score == 0.25
    right = task(asked("cat"), asked("dog", position=["right of", 0]))
    assert grade({"cat": [at()]}, right, no_colors).score == pytest.approx(1 / 3)
    both = task(asked("cat"), asked("dog", color="red", position=["above", 0]))
    assert grade({"cat": [at()]}, both, no_colors).score == pytest.approx(1 / 3)


def test_the_grade_of_a_position_is_that_of_flow_grpo() -> None:
    right = task(asked("cat"), asked("dog", position=["right of", 0]))
    assert grade({"cat": [at()], "dog": [at(RIGHT)]}, right, no_colors).score == 1
    assert grade({"cat": [at()], "dog": [at(LEFT)]}, right, no_colors).score == 0.75  # terms 1, 1, 0 and a 1
    assert grade({"cat": [at()] * 2, "dog": [at(RIGHT)]}, right, no_colors).score == pytest.approx(1 / 3)


def test_with_a_wrong_color_the_position_has_no_term() -> None:
    right = task(asked("cat"), asked("dog", color="red", position=["right of", 0]))
    assert grade({"cat": [at()], "dog": [at(RIGHT)]}, right, colors("blue")).score == pytest.approx(2 / 3)


def test_the_strict_verdict_requires_exact_counts_and_ignores_exclusions() -> None:
    two = {"dog": [at(), at()]}
    assert judge(two, task(asked()), no_colors).correct
    assert not grade(two, task(asked()), no_colors).correct
    assert grade(two, task(asked(count=2), exclude=[asked(count=1)]), no_colors).correct


def test_a_full_grade_is_equivalent_to_a_strict_verdict() -> None:
    right = task(asked("cat"), asked("dog", color="red", position=["right of", 0]))
    for dog in (LEFT, RIGHT, MIDDLE):
        for color in ("red", "blue"):
            verdict = grade({"cat": [at()], "dog": [at(dog)]}, right, colors(color))
            assert verdict.correct == (verdict.score == 1)
