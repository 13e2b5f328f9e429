"""Rewards from names, import paths and addresses; their weighted sum."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from star_trainer.rewards import BUILT_IN, Reward, RewardError, RewardService, WeightedSum, build
from star_trainer.rewards.extras import require
from star_trainer.rewards.images import encode, to_pil, to_uint8
from star_trainer.rewards.jpeg import JpegCompressibility


class Constant:
    name = "constant"

    def __init__(self, *, value: float = 1.0, device: str = "nowhere") -> None:
        self.value = value
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Tensor:
        return torch.full((len(images),), self.value)


@pytest.fixture(autouse=True)
def mine() -> Iterator[types.ModuleType]:
    """A user's module."""
    module = types.ModuleType("mine")
    module.Constant = Constant
    module.ready = Constant(value=7.0)
    module.make = lambda scale: Constant(value=10 * scale)
    module.nothing = lambda: None
    module.number = 3
    sys.modules["mine"] = module
    yield module
    del sys.modules["mine"]


def test_a_built_in_reward_is_made_with_its_options() -> None:
    total = build({"jpeg-compressibility": 0.5}, options={"jpeg-compressibility": {"divisor": 1.0}})
    reward = total.rewards["jpeg-compressibility"]
    assert isinstance(reward, JpegCompressibility)
    assert isinstance(reward, Reward)
    assert reward.divisor == 1.0
    assert total.weights == {"jpeg-compressibility": 0.5}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_reward_has_its_name(name: str) -> None:
    module, _, attribute = BUILT_IN[name].partition(":")
    found = getattr(pytest.importorskip(module), attribute)
    assert found.name == name


def test_models_are_not_imported_with_the_package() -> None:
    code = "import sys, star_trainer.rewards; print(sorted({'transformers', 'rapidocr', 'PIL'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert run.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_an_import_path_may_be_a_class_a_function_or_a_reward(images: Tensor) -> None:
    options = {"mine:Constant": {"value": 2.0}, "mine:make": {"scale": 3.0}}
    total = build({"mine:Constant": 1.0, "mine:make": 1.0, "mine:ready": 1.0}, options=options)
    scores = total.scores(images, [""] * 4, [{}] * 4)
    assert {name: values.tolist()[0] for name, values in scores.parts.items()} == {
        "constant": 2.0,
        "constant-2": 30.0,
        "constant-3": 7.0,
    }
    assert scores.total.tolist() == [39.0] * 4


def test_the_device_is_passed_to_constructors_that_accept_it() -> None:
    assert build({"mine:Constant": 1.0}, device="meta").rewards["constant"].device == "meta"
    chosen = build({"mine:Constant": 1.0}, device="meta", options={"mine:Constant": {"device": "cpu"}})
    assert chosen.rewards["constant"].device == "cpu"


def test_an_address_makes_a_remote_reward_named_by_host_and_path() -> None:
    total = build({"http://127.0.0.1:9/score?key=secret": 1.0})
    assert list(total.rewards) == ["127.0.0.1:9/score"]


@pytest.mark.parametrize("key", ["nosuch", "geneval ", "file:///etc", "mine:", ":mine", "not a path:x", "ftp://x/y"])
def test_an_unknown_key_is_refused_with_what_is_accepted(key: str) -> None:
    with pytest.raises(ValueError, match=r"jpeg-compressibility, a 'package.module:attribute', or an http") as caught:
        build({key: 1.0})
    assert repr(key) in str(caught.value)


def test_wrong_options_name_the_reward_and_its_signature() -> None:
    with pytest.raises(ValueError, match=r"options of 'mine:Constant' must fit Constant\(.*value.*'colour'"):
        build({"mine:Constant": 1.0}, options={"mine:Constant": {"colour": 1}})
    with pytest.raises(ValueError, match="because it is an instance"):
        build({"mine:ready": 1.0}, options={"mine:ready": {"value": 1}})
    with pytest.raises(ValueError, match=r"got options for \['ocr'\]"):
        build({"mine:ready": 1.0}, options={"ocr": {}})


def test_wrong_options_of_an_address_do_not_show_its_query() -> None:
    with pytest.raises(ValueError, match="must fit") as caught:
        build({"http://host/x?key=secret": 1.0}, options={"http://host/x?key=secret": {"color": 1}})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jpeg-compressibility", {"quality": "95"}, "quality must be an integer, got '95'"),
        ("jpeg-compressibility", {"divisor": math.nan}, "divisor must be a finite number, above 0, got nan"),
        ("ocr", {"threads": 0}, "threads must be an integer, at least 1, got 0"),
        ("ocr", {"params": ["x"]}, "params must be a mapping"),
        ("clipscore", {"model": 3}, "model must be a name on the Hugging Face hub or a path, got 3"),
        ("clipscore", {"device": "nowhere"}, "device must be a device of torch, .* got 'nowhere'"),
        ("pickscore", {"batch_size": "8"}, "batch_size must be an integer, got '8'"),
        ("pickscore", {"processor": ""}, "processor must be a name on the Hugging Face hub or a path, got ''"),
        ("aesthetic", {"head": 3}, "head must be"),
        ("geneval", {"score": "best"}, "score must be one of"),
        ("geneval", {"threshold": 2}, "threshold must be a finite number, at least 0 and at most 1, got 2"),
        ("geneval", {"max_objects": 1.5}, "max_objects must be an integer, got 1.5"),
        ("geneval", {"resize": 800}, "resize must be a pair of the shortest and the longest edge, or None, got 800"),
        ("geneval", {"resize": [800, 0]}, "resize must be an integer, at least 1, got 0"),
        ("scene", {"strict": "no"}, "strict must be true or false, got 'no'"),
    ],
)
def test_options_out_of_range_or_of_another_type_name_the_reward(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"reward {name!r}: {message}"):
        build({name: 1.0}, options={name: options})


def test_an_error_of_a_constructor_names_the_reward(mine: types.ModuleType) -> None:
    def picky(size: int) -> Constant:
        raise TypeError(f"size must be small, got {size}")

    mine.picky = picky
    with pytest.raises(ValueError, match="reward 'mine:picky': size must be small, got 3"):
        build({"mine:picky": 1.0}, options={"mine:picky": {"size": 3}})


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (["scene"], None, "weights must be a mapping with string keys, got list"),
        ({1: 1.0}, None, "weights must be a mapping with string keys"),
        ({"scene": 1.0}, ["x"], "options must be a mapping with string keys, got list"),
        ({"scene": 1.0}, {"scene": None}, "options of 'scene' must be a mapping with string keys, got NoneType"),
    ],
)
def test_weights_and_options_are_mappings(weights: Any, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build(weights, options=options)


def test_other_objects_are_not_rewards() -> None:
    with pytest.raises(TypeError, match="must return a reward"):
        build({"mine:nothing": 1.0})
    with pytest.raises(TypeError, match="must be a reward, a class"):
        build({"mine:number": 1.0})
    with pytest.raises(ValueError, match=r"module 'mine' has no attribute 'absent'$"):
        build({"mine:absent": 1.0})
    with pytest.raises(ModuleNotFoundError):
        build({"no_such_module_here:x": 1.0})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("mine:redy", "has no attribute 'redy'; did you mean ready"),
        ("mine.py:ready", "; did you mean mine:ready"),
        ("mine.ready", "; did you mean mine:ready"),
        ("genevl", "; did you mean geneval"),
        ("mine.py", r"or an http\(s\) URL$"),
    ],
)
def test_a_misspelt_reward_suggests_the_intended_one(key: str, message: str) -> None:
    with pytest.raises((ValueError, ModuleNotFoundError), match=message):
        build({key: 1.0})


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None, True])
def test_a_weight_must_be_a_finite_number(weight: object) -> None:
    with pytest.raises(ValueError, match="weights must be finite numbers"):
        build({"mine:ready": weight})


def test_no_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one reward"):
        build({})


def test_a_sum_is_a_reward_itself(images: Tensor) -> None:
    total = WeightedSum({"a": Constant(value=2.0), "b": Constant(value=3.0)}, {"a": 0.5, "b": -1.0})
    assert isinstance(total, Reward)
    assert total(images, [""] * 4, [{}] * 4).tolist() == [-2.0] * 4


def test_the_parts_of_a_sum_are_copies_of_the_rewards_tensors(images: Tensor) -> None:
    with torch.inference_mode():
        answer = torch.ones(4)
    scores = WeightedSum({"a": lambda *_: answer}, {"a": 1.0}).scores(images, [""] * 4, [{}] * 4)
    scores.parts["a"].add_(1)  # which an inference tensor would not allow
    assert answer.tolist() == [1.0] * 4


class Spoiling(Constant):
    """A reward that changes all of its arguments."""

    name = "spoiling"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Tensor:
        images.zero_()
        for record in metadata:
            record["include"].clear()
        return super().__call__(images, prompts, metadata)


class Looking(Constant):
    """The mean of images; fails if the metadata was changed."""

    name = "looking"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Tensor:
        assert all(record["include"] == [1] for record in metadata)
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("through", ["sum", "service"])
def test_a_reward_may_change_its_arguments(images: Tensor, through: str) -> None:
    kept, metadata = images.clone(), [{"include": [1]} for _ in range(4)]
    total = WeightedSum({"first": Spoiling(), "second": Looking()}, {"first": 1.0, "second": 1.0})
    if through == "sum":
        scores = total.scores(images, [""] * 4, metadata)
    else:
        with RewardService(total) as service:
            scores = service.submit(images, [""] * 4, metadata, indices=range(4)).result()
    assert torch.equal(scores.parts["second"], kept.mean((1, 2, 3)))
    assert torch.equal(images, kept)
    assert metadata == [{"include": [1]}] * 4


@pytest.mark.parametrize(
    "answer", ["1.0", ["1"] * 4, [1.0] * 4, None, 1.0, torch.zeros(4, 1), torch.zeros(5)], ids=repr
)
def test_a_result_of_the_wrong_type_names_the_reward(images: Tensor, answer: object) -> None:
    total = WeightedSum({"a": Constant(), "b": lambda *_: answer}, {"a": 1.0, "b": 1.0})
    with pytest.raises(RewardError, match="reward 'b' returned"):
        total(images, [""] * 4, [{}] * 4)
    with RewardService(total) as service:
        pending = service.submit(images, [""] * 4, [{}] * 4, indices=range(4))
        with pytest.raises(RewardError, match=r"reward 'b' failed on sample 0 .* returned"):
            pending.result()


def test_a_sum_names_the_part_with_a_wrong_result(images: Tensor) -> None:
    total = WeightedSum({"a": Constant(), "b": lambda *_: torch.zeros(3)}, {"a": 1.0, "b": 1.0})
    with pytest.raises(RewardError, match=r"reward 'b' returned a tensor of shape \(3,\), expected \(4,\)"):
        total(images, [""] * 4, [{}] * 4)


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"'ocr' needs no_such_module_here .*star-kernels\[rewards\]"):
        require("no_such_module_here", "ocr")


def test_jpeg_prefers_images_that_are_easy_to_compress(images: Tensor) -> None:
    pytest.importorskip("PIL")
    both = torch.stack([images[0], torch.full_like(images[0], 0.5)])
    noise, flat = JpegCompressibility()(both, ["", ""], [{}, {}]).tolist()
    assert noise < flat < 0


def test_jpeg_is_the_size_in_kilobytes_over_the_divisor(images: Tensor) -> None:
    pytest.importorskip("PIL")
    sizes = [len(encode(image, "JPEG", quality=95)) for image in to_pil(images, "test")]
    for divisor in (1.0, 500.0):
        scores = JpegCompressibility(divisor=divisor)(images, [""] * 4, [{}] * 4)
        assert scores.tolist() == pytest.approx([-size / 1000 / divisor for size in sizes])
    for wrong in ({"quality": 0}, {"divisor": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            JpegCompressibility(**wrong)


def test_images_become_bytes_by_rounding() -> None:
    image = torch.tensor([0.0, 0.5 / 255, 0.51 / 255, 1.0, 1.2, -0.1]).repeat(3, 1)[None, :, None, :]
    assert to_uint8(image).shape == (1, 1, 6, 3)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255, 0]
