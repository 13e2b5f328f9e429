"""GenEval's detector and colour classifier with tiny random models, and the reward that uses them."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from star_trainer.rewards import Reward, build
from star_trainer.rewards.clip import Clip
from star_trainer.rewards.geneval.colors import TEMPLATES, ColorClassifier, cut_out, middle
from star_trainer.rewards.geneval.detector import MAX_INSTANCES, Mask2Former, instances
from star_trainer.rewards.geneval.reward import GenEval
from star_trainer.rewards.geneval.rules import Detection
from star_trainer.rewards.geneval.task import COLORS
from star_trainer.rewards.images import to_pil

pytest.importorskip("PIL")
FULL = 20.0  # a logit whose sigmoid is 1 to float32


def rectangle(height: int, width: int, rows: slice, columns: slice, logit: float = FULL) -> Tensor:
    """Mask logits ``[height, width]``, positive in a rectangle."""
    mask = torch.full((height, width), -FULL)
    mask[rows, columns] = logit
    return mask


def test_a_box_spans_its_mask() -> None:
    masks = rectangle(32, 40, slice(4, 10), slice(6, 21))[None]
    [(label, found)] = instances(torch.tensor([[FULL, 0.0, 0.0]]), masks, (32, 40), 0.3)
    assert label == 0
    assert found.box == (6.0, 4.0, 21.0, 10.0)
    assert found.mask is not None
    assert torch.equal(found.mask, masks[0] > 0)
    assert found.score == pytest.approx(1.0)


def test_masks_and_boxes_are_at_the_size_of_the_image() -> None:
    masks = rectangle(8, 8, slice(0, 4), slice(4, 8))[None]
    [(_, found)] = instances(torch.tensor([[FULL, 0.0]]), masks, (64, 128), 0.3)
    assert found.mask is not None
    assert found.mask.shape == (64, 128)
    assert found.box == (64.0, 0.0, 128.0, 32.0)


def test_confidence_is_class_probability_times_mean_mask_probability() -> None:
    classes = torch.tensor([[math.log(6), math.log(3), math.log(1)]])  # 0.6, 0.3, and 0.1 for no object
    masks = rectangle(8, 8, slice(0, 4), slice(0, 8), math.log(4))[None]  # 0.8 within
    found = instances(classes, masks, (8, 8), 0.0)
    assert [label for label, _ in found] == [0, 1]
    assert [d.score for _, d in found] == pytest.approx([0.6 * 0.8, 0.3 * 0.8])


@pytest.mark.parametrize(("floor", "count"), [(0.2, 2), (0.25, 1), (0.47, 1), (0.5, 0), (0.7, 0)])
def test_only_confidences_above_the_floor_are_found(floor: float, count: int) -> None:
    classes = torch.tensor([[math.log(6), math.log(3), math.log(1)]])
    masks = rectangle(8, 8, slice(0, 4), slice(0, 8), math.log(4))[None]
    assert len(instances(classes, masks, (8, 8), floor)) == count


def test_no_object_and_empty_masks_are_not_detected() -> None:
    nothing = torch.tensor([[0.0, 0.0, FULL]])
    assert instances(nothing, rectangle(8, 8, slice(0, 4), slice(0, 4))[None], (8, 8), 0.0001) == []
    assert instances(torch.tensor([[FULL, 0.0, 0.0]]), torch.full((1, 8, 8), -FULL), (8, 8), 0.3) == []


def test_each_query_keeps_its_own_mask() -> None:
    masks = torch.stack([rectangle(16, 16, slice(0, 4), slice(0, 4)), rectangle(16, 16, slice(8, 16), slice(8, 16))])
    classes = torch.tensor([[0.0, FULL, 0.0], [FULL, 0.0, 0.0]])
    found = {label: d.box for label, d in instances(classes, masks, (16, 16), 0.3)}
    assert found == {1: (0.0, 0.0, 4.0, 4.0), 0: (8.0, 8.0, 16.0, 16.0)}


def test_an_image_has_at_most_a_hundred_instances() -> None:
    masks = torch.full((30, 4, 4), FULL)
    assert len(instances(torch.zeros(30, 9), masks, (4, 4), 0.0)) == MAX_INSTANCES


def test_the_detector_names_classes_as_geneval_does(tiny_mask2former: Path) -> None:
    assert Mask2Former(tiny_mask2former).classes == ["computer mouse", "bench", "clock"]


def test_detections_do_not_depend_on_the_batch(tiny_mask2former: Path, images: Tensor) -> None:
    pictures = to_pil(images, "test")
    one_by_one = Mask2Former(tiny_mask2former, resize=(64, 96), batch_size=1)(pictures, [0.0] * 4)
    together = Mask2Former(tiny_mask2former, resize=(64, 96), batch_size=3)(pictures, [0.0] * 4)
    for found, other in zip(one_by_one, together, strict=True):
        assert found.keys() == other.keys()
        for noun in found:
            assert [d.score for d in found[noun]] == pytest.approx([d.score for d in other[noun]], abs=1e-5)
            assert all(d.mask is not None and d.mask.shape == (40, 48) for d in found[noun])
    assert one_by_one[0]["bench"][0].score != one_by_one[1]["bench"][0].score


def test_each_image_has_its_own_floor(tiny_mask2former: Path, images: Tensor) -> None:
    detect = Mask2Former(tiny_mask2former, resize=None)
    found = detect(to_pil(images[:2], "test"), [0.0, 1.0])
    assert found[0]
    assert not found[1]


def test_the_input_size_of_the_detector_can_be_set(
    tiny_mask2former: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for resize, expected in (((64, 96), (64, 96)), ((128, 200), (128, 160)), (None, (64, 96))):
        detect = Mask2Former(tiny_mask2former, resize=resize)
        seen = []
        forward = detect._model.forward

        def watch(pixel_values: Tensor, forward=forward, seen=seen, **inputs: Tensor) -> object:
            seen.append(tuple(pixel_values.shape[-2:]))
            return forward(pixel_values=pixel_values, **inputs)

        monkeypatch.setattr(detect._model, "forward", watch)
        detect(to_pil(images[:1], "test"), [0.5])
        assert seen == [expected]  # 40 by 48 with its sides' proportion, up to a multiple of 32


def test_a_cut_out_is_the_box_with_grey_around_the_mask() -> None:
    image = to_pil(torch.ones(1, 3, 10, 12), "test")[0]
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[2:6, 3:5] = True
    crop = cut_out(image, Detection((3.0, 2.0, 7.0, 6.0), 0.9, mask))
    assert crop.size == (4, 4)
    assert [crop.getpixel((x, 1)) for x in range(4)] == [(255, 255, 255)] * 2 + [(153, 153, 153)] * 2
    assert cut_out(image, Detection((3.0, 2.0, 7.0, 6.0), 0.9)).getpixel((3, 1)) == (255, 255, 255)


def test_a_very_long_box_is_shortened_around_its_centre() -> None:
    assert middle((0, 0, 80, 10)) == (0, 0, 80, 10)
    assert middle((0, 0, 100, 10)) == (10, 0, 90, 10)
    assert middle((5, 0, 6, 500)) == (5, 246, 6, 254)


def test_the_color_has_the_features_most_similar_to_the_crop(tiny_clip: Path, images: Tensor) -> None:
    clip = Clip(tiny_clip, reward="test")
    image = to_pil(images[:1], "test")[0]
    boxes = [Detection((0.0, 0.0, 24.0, 20.0), 0.9), Detection((10.0, 10.0, 40.0, 40.0), 0.8)]
    features = clip.images([cut_out(image, box) for box in boxes])
    expected = []
    for feature in features:
        similarity = {}
        for color in COLORS:
            texts = clip.texts([template.format(color=color, noun="bench") for template in TEMPLATES])
            direction = texts.mean(0)
            similarity[color] = float(feature @ direction / direction.norm())
        expected.append(max(similarity, key=lambda color: similarity[color]))
    classifier = ColorClassifier(clip)
    assert classifier(image, boxes, "bench") == expected
    assert classifier(image, [], "bench") == []


def test_the_texts_of_a_color_are_genevals(tiny_clip: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip(tiny_clip, reward="test")
    seen: list[str] = []
    texts = clip.texts
    monkeypatch.setattr(clip, "texts", lambda asked: seen.extend(asked) or texts(asked))
    classifier = ColorClassifier(clip)
    for _ in range(2):  # the second time from memory
        classifier(to_pil(images[:1], "test")[0], [Detection((0.0, 0.0, 9.0, 9.0), 1.0)], "wine glass")
    assert len(seen) == 30
    assert seen[:3] == ["a photo of a red wine glass", "a photo of a red-colored wine glass", "a photo of a red object"]


@pytest.fixture
def reward(tiny_mask2former: Path, tiny_clip: Path) -> GenEval:
    return GenEval(detector=tiny_mask2former, clip=tiny_clip, resize=None, threshold=0.0, counting_threshold=0.0)


def detections(*boxes: tuple[float, float, float, float], score: float = 0.95) -> list[Detection]:
    return [Detection(box, score) for box in boxes]


def test_the_reward_runs_its_models(reward: GenEval, images: Tensor) -> None:
    line = {"include": [{"class": "computer mouse", "count": 1, "color": "red"}]}
    scores = reward(images, ["a photo of a red computer mouse"] * 4, [line] * 4)
    assert scores.dtype == torch.float32
    assert scores.shape == (4,)
    assert set(scores.tolist()) <= {0.0, 1.0}
    assert isinstance(reward, Reward)


@pytest.mark.parametrize(
    ("score", "expected"), [("correct", [1, 1, 0]), ("strict", [1, 0, 0]), ("graded", [1, 0, 0.5])]
)
def test_the_kinds_of_score(
    reward: GenEval, images: Tensor, monkeypatch: pytest.MonkeyPatch, score: str, expected: list[float]
) -> None:
    a, b, c = (0.0, 0.0, 5.0, 5.0), (9.0, 9.0, 20.0, 20.0), (30.0, 30.0, 40.0, 40.0)
    found = [{"bench": detections(a, b)}, {"bench": detections(a, b, c, c)}, {"bench": detections(a)}]
    monkeypatch.setattr(reward, "_detect", _Found(found))
    reward.score = score
    line = {"tag": "counting", "include": [{"class": "bench", "count": 2}]}
    assert reward(images[:3], [""] * 3, [line] * 3).tolist() == expected


def test_counting_has_a_threshold_of_its_own(reward: GenEval, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    reward.threshold, reward.counting_threshold = 0.3, 0.9
    found = [{"bench": detections((0.0, 0.0, 5.0, 5.0), score=0.6)}] * 2
    detect = _Found(found)
    monkeypatch.setattr(reward, "_detect", detect)
    lines = [{"tag": tag, "include": [{"class": "bench", "count": 1}]} for tag in ("counting", "single_object")]
    assert reward(images[:2], [""] * 2, lines).tolist() == [0.0, 1.0]
    assert detect.floors == [0.9, 0.3]


class _Found:
    """A detector that returns given detections."""

    classes = ("computer mouse", "bench", "clock")

    def __init__(self, found: list[dict[str, list[Detection]]]) -> None:
        self.found = found
        self.floors: list[float] = []

    def __call__(self, images: object, floors: list[float]) -> list[dict[str, list[Detection]]]:
        self.floors = list(floors)
        return self.found


def test_a_class_that_the_detector_does_not_have_is_refused(reward: GenEval, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"classes of the detector \(computer mouse, bench, clock\), got dragon"):
        reward(images[:1], [""], [{"include": [{"class": "dragon", "count": 1}]}])


def test_a_plain_prompt_is_refused(reward: GenEval, images: Tensor) -> None:
    with pytest.raises(ValueError, match="geneval requires metadata"):
        reward(images[:1], ["a cat"], [{}])


def test_defaults_are_genevals() -> None:
    defaults = {name: p.default for name, p in inspect.signature(GenEval).parameters.items()}
    expected = {
        "score": "correct",
        "threshold": 0.3,
        "counting_threshold": 0.9,
        "max_objects": 16,
        "max_overlap": 1.0,
        "position_threshold": 0.1,
        "detector": "facebook/mask2former-swin-small-coco-instance",
        "clip": "openai/clip-vit-large-patch14",
    }
    assert {name: defaults[name] for name in expected} == expected


def test_an_unknown_score_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="score must be one of correct, strict, graded"):
        build({"geneval": 1.0}, options={"geneval": {"score": "loose"}})
