"""The reward service: order of batches, samples that fail, calls that hang, and independence of batches."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
from brightness import PROMPTS, Brightness, fails_on, submit, waits_for
from torch import Tensor

from star_trainer.rewards import RewardError, RewardService, WeightedSum

TINY = 0.5  # seconds: long for these rewards, short for a test


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event for rewards that hang until the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def test_scores_of_a_single_reward_are_total_and_part(images: Tensor) -> None:
    with RewardService(Brightness()) as service:
        scores = submit(service, images).result()
    assert torch.equal(scores.total, images.mean((1, 2, 3)))
    assert list(scores.parts) == ["brightness"]
    assert torch.equal(scores.parts["brightness"], scores.total)
    assert scores.total.dtype == torch.float32


def test_a_weighted_sum_is_reported_part_by_part(images: Tensor) -> None:
    other = Brightness(lambda prompts: torch.arange(len(prompts)), name="rank")
    total = WeightedSum({"brightness": Brightness(), "rank": other}, {"brightness": 2.0, "rank": -0.5})
    with RewardService(total) as service:
        scores = submit(service, images).result()
    assert torch.equal(scores.parts["rank"], torch.arange(4.0))
    assert torch.allclose(scores.total, 2 * images.mean((1, 2, 3)) - 0.5 * torch.arange(4.0))


def test_scoring_does_not_block_the_caller_and_keeps_the_order(images: Tensor, release: threading.Event) -> None:
    reward = Brightness(waits_for(release))
    with RewardService(reward) as service:
        pending = [submit(service, images, [f"{i}{prompt}" for prompt in PROMPTS]) for i in range(3)]
        assert not any(one.done() for one in pending)  # all submitted while the first call is still in progress
        release.set()
        results = [one.result() for one in pending]
    assert len(results) == 3
    assert [call[0] for call in reward.calls] == ["0a cat", "1a cat", "2a cat"]
    assert threading.current_thread() not in reward.threads
    assert len(set(reward.threads)) == 1
    assert reward.threads[0].daemon


def test_batch_size_limits_a_call_and_does_not_change_scores(images: Tensor) -> None:
    reward = Brightness()
    with RewardService(reward, batch_size=3) as service:
        scores = submit(service, images).result()
    assert [len(call) for call in reward.calls] == [3, 1]
    assert torch.equal(scores.total, images.mean((1, 2, 3)))


def test_stop_names_reward_sample_prompt_and_cause(images: Tensor) -> None:
    with RewardService(Brightness(fails_on("bad"))) as service, pytest.raises(RewardError) as caught:
        submit(service, images).result()
    for part in ("'brightness'", "sample 12", "'a bad bench'", "KeyError: 'no such thing'"):
        assert part in str(caught.value)
    assert "a cat" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_without_a_message_only_fails_its_sample(images: Tensor) -> None:
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def act(prompts: Sequence[str]) -> None:
        if any("bad" in prompt for prompt in prompts):
            raise Speechless

    with RewardService(Brightness(act), on_failure="skip") as service:
        pending = submit(service, images)
        with pytest.warns(RuntimeWarning, match="sample 12 .*: Speechless;"):
            assert pending.result().total.isnan().tolist() == [False, False, True, False]


def test_stop_does_not_affect_other_batches(images: Tensor) -> None:
    with RewardService(Brightness(fails_on("bad"))) as service:
        before, broken, after = (submit(service, images, p) for p in (["x"] * 4, PROMPTS, ["y"] * 4))
        with pytest.raises(RewardError):
            broken.result()
        with pytest.raises(RewardError):  # repeated calls raise again
            broken.result()
        assert torch.equal(before.result().total, images.mean((1, 2, 3)))
        assert torch.equal(after.result().total, images.mean((1, 2, 3)))


def test_skip_gives_nan_to_the_failing_sample_only_and_warns_once(images: Tensor) -> None:
    total = WeightedSum({"a": Brightness(fails_on("bad")), "b": Brightness()}, {"a": 1.0, "b": 1.0})
    with RewardService(total, on_failure="skip") as service:
        pending = submit(service, images)
        with pytest.warns(RuntimeWarning) as caught:
            scores = pending.result()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pending.result()
    assert [warning.filename for warning in caught] == [__file__]
    assert "'a' failed on sample 12 ('a bad bench'): KeyError" in str(caught[0].message)
    kept = torch.tensor([True, True, False, True])
    assert torch.equal(scores.total.isfinite(), kept)
    assert torch.equal(scores.parts["a"].isfinite(), kept)
    assert torch.equal(scores.parts["b"], images.mean((1, 2, 3)))
    assert torch.equal(scores.total[kept], 2 * images.mean((1, 2, 3))[kept])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_failure_of_its_sample(images: Tensor, value: float) -> None:
    answer = torch.tensor([1.0, value, 3.0, 4.0])
    named = rf"sample 11 \('a dog'\): returned {value}"
    with RewardService(Brightness(lambda _: answer)) as service, pytest.raises(RewardError, match=named):
        submit(service, images).result()
    lenient = RewardService(Brightness(lambda _: answer), on_failure="skip")
    with lenient as service, pytest.warns(RuntimeWarning, match="sample 11"):
        scores = submit(service, images).result()
    assert scores.total.isnan().tolist() == [False, True, False, False]
    assert scores.total[[0, 2, 3]].tolist() == [1.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(4, 1), r"shape \(4, 1\)"),
        (torch.zeros(()), r"shape \(\)"),
        ([0.0] * 4, "returned list"),
        (torch.zeros(1, dtype=torch.complex64), "complex64"),
    ],
)
def test_a_result_of_the_wrong_type_or_shape_is_a_failure(images: Tensor, answer: Tensor, message: str) -> None:
    with RewardService(Brightness(lambda _: answer)) as service, pytest.raises(RewardError, match=message):
        submit(service, images).result()


def test_a_batch_that_only_fails_as_a_whole_is_scored_one_by_one(images: Tensor) -> None:
    def act(prompts: Sequence[str]) -> None:
        if len(prompts) > 1:
            raise MemoryError("too many")

    reward = Brightness(act)
    note = "none of them alone: MemoryError: too many"
    with RewardService(reward) as service, pytest.warns(RuntimeWarning, match=note):
        scores = submit(service, images).result()
    assert torch.equal(scores.total, images.mean((1, 2, 3)))
    assert [len(call) for call in reward.calls] == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("on_failure", ["stop", "skip"])
def test_a_call_that_hangs_is_abandoned_and_a_new_thread_continues(
    images: Tensor, release: threading.Event, on_failure: str
) -> None:
    def act(prompts: Sequence[str]) -> None:
        if "hang" in prompts:
            release.wait()

    reward = Brightness(act)
    with RewardService(reward, timeout=TINY, on_failure=on_failure, batch_size=2) as service:
        hung, after = submit(service, images, ["fine", "fine", "hang", "too"]), submit(service, images)
        if on_failure == "stop":
            with pytest.raises(RewardError, match=r"sample 12 \('hang'\), sample 13 \('too'\): no result after 0.5 s"):
                hung.result()
        else:
            with pytest.warns(RuntimeWarning) as caught:
                scores = hung.result()
            assert len(caught) == 2
            assert scores.total.isnan().tolist() == [False, False, True, True]
        assert torch.equal(after.result().total, images.mean((1, 2, 3)))
    assert reward.threads[-1] is not reward.threads[0]
    assert reward.threads[0].is_alive()  # still in the call that hangs


def test_a_reward_that_raises_timeout_error_has_not_hung(images: Tensor) -> None:
    def act(prompts: Sequence[str]) -> None:
        raise TimeoutError("of its own")

    reward = Brightness(act)
    with RewardService(reward) as service, pytest.raises(RewardError, match="TimeoutError: of its own"):
        submit(service, images).result()
    assert len(set(reward.threads)) == 1


def test_an_image_that_is_not_finite_is_not_passed_to_rewards(images: Tensor) -> None:
    images[1, 0, 3, 3] = math.nan
    reward = Brightness()
    with RewardService(reward) as service, pytest.raises(RewardError, match=r"sample 11 .*the image contains NaN"):
        submit(service, images).result()
    with RewardService(reward, on_failure="skip") as service, pytest.warns(RuntimeWarning, match="sample 11"):
        scores = submit(service, images).result()
    assert reward.calls == [["a cat", "a bad bench", "a clock"]]
    assert scores.total.isnan().tolist() == [False, True, False, False]


def test_a_part_of_weight_zero_does_not_affect_the_total(images: Tensor) -> None:
    watched = Brightness(fails_on("bad"), name="watched")
    total = WeightedSum({"a": Brightness(), "watched": watched}, {"a": 1.0, "watched": 0.0})
    with RewardService(total, on_failure="skip") as service, pytest.warns(RuntimeWarning, match="'watched'"):
        scores = submit(service, images).result()
    assert torch.equal(scores.total, images.mean((1, 2, 3)))
    assert scores.parts["watched"].isnan().sum() == 1


def test_a_message_about_many_samples_is_short(images: Tensor, release: threading.Event) -> None:
    many = images[:1].expand(30, -1, -1, -1)
    with RewardService(Brightness(waits_for(release)), timeout=TINY) as service, pytest.raises(RewardError) as caught:
        submit(service, many, ["x" * 500] * 30).result()
    assert len(str(caught.value)) < 700
    assert " 39" in str(caught.value)


def test_scores_are_a_copy_of_the_rewards_tensor(images: Tensor) -> None:
    with torch.inference_mode():
        answer = torch.ones(4)
    with RewardService(Brightness(lambda _: answer)) as service:
        scores = submit(service, images).result()
    scores.parts["brightness"] += 1  # which an inference tensor would not allow
    scores.total.add_(1)
    assert answer.tolist() == [1.0] * 4


def test_what_was_submitted_before_close_is_still_scored(images: Tensor) -> None:
    service = RewardService(Brightness())
    pending = [submit(service, images) for _ in range(3)]
    service.close()
    service.close()
    assert all(len(one.result().total) == 4 for one in pending)
    with pytest.raises(RuntimeError, match="closed"):
        submit(service, images)


def test_an_empty_batch_has_no_scores() -> None:
    reward = Brightness()
    with RewardService(reward) as service:
        scores = submit(service, torch.empty(0, 3, 8, 8), []).result()
    assert scores.total.shape == (0,)
    assert reward.calls == []


def test_result_has_a_timeout_of_its_own(images: Tensor, release: threading.Event) -> None:
    reward = Brightness(waits_for(release))
    with RewardService(reward) as service:
        pending = submit(service, images)
        with pytest.raises(TimeoutError):
            pending.result(0.01)
        release.set()
        assert len(pending.result().total) == 4


def test_a_wrong_batch_is_refused_at_once(images: Tensor) -> None:
    with RewardService(Brightness()) as service:
        for bad in (images[0], images[:, :1], (images * 255).byte()):
            with pytest.raises(ValueError, match="images must be float"):
                submit(service, bad)
        with pytest.raises(ValueError, match=r"images must be in 0..1"):
            submit(service, images * 2 - 1)
        with pytest.raises(ValueError, match="prompts must have one entry"):
            service.submit(images, PROMPTS[:3], [{}] * 4, indices=range(4))
        with pytest.raises(ValueError, match="metadata must have one entry"):
            service.submit(images, PROMPTS, [{}], indices=range(4))
        with pytest.raises(ValueError, match="indices must have one entry"):
            service.submit(images, PROMPTS, [{}] * 4, indices=range(3))


@pytest.mark.parametrize(
    "setting", [{"timeout": 0}, {"timeout": math.inf}, {"on_failure": "ignore"}, {"batch_size": 0}], ids=str
)
def test_a_wrong_setting_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        RewardService(Brightness(), **setting)
