"""Blocks are ranked by the concentration of their maps and by their agreement with the maps of the final image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels.rank_blocks import Ranking, Score, agreement, concentration, rank

STEPS, SIDE = 6, 12
ROWS, COLUMNS = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
OBJECT = (((ROWS - 4) ** 2 + (COLUMNS - 5) ** 2) < 7).float()
BACKGROUND = 0.01


def image(*blocks: Tensor) -> Tensor:
    """Maps ``[Steps, blocks, 1, h, w]`` that are the same in every step."""
    return torch.stack(blocks)[None, :, None].expand(STEPS, -1, -1, -1, -1)


def noisy(maps: Tensor, seed: int = 0) -> Tensor:
    return maps + 0.02 * torch.rand(maps.shape, generator=torch.Generator().manual_seed(seed))


SHARP, DULL = OBJECT + BACKGROUND, OBJECT + 3
FLAT = torch.ones(SIDE, SIDE)
WRONG = torch.zeros(SIDE, SIDE)
WRONG[-1, -1] = 1  # a sharp map of something else


def test_the_block_that_is_sharp_and_agrees_is_first() -> None:
    found = rank([image(noisy(FLAT), DULL, SHARP, WRONG + BACKGROUND, noisy(SHARP))])
    assert {score.block for score in found.scores[:2]} == {2, 4}
    by_block = {score.block: score for score in found.scores}
    assert by_block[2].agreement > 0.7
    assert by_block[3].agreement < 0.1 < by_block[3].concentration
    assert by_block[0].concentration < 0.01
    assert by_block[1].concentration < by_block[2].concentration


def test_scores_do_not_depend_on_the_mass_of_a_block() -> None:
    maps = image(SHARP, noisy(SHARP), noisy(DULL, 1))
    scaled = maps * torch.tensor([1.0, 1e-3, 50.0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(agreement(scaled), agreement(maps))
    torch.testing.assert_close(concentration(scaled), concentration(maps))


def test_concentration_is_0_for_a_uniform_map_and_close_to_1_for_a_single_position() -> None:
    found = concentration(image(FLAT, WRONG, torch.zeros(SIDE, SIDE)))[:, 0]
    expected = torch.tensor([0.0, 1 - 1 / SIDE**2, 1 - 1 / SIDE**2], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_the_reference_is_the_mean_of_the_other_blocks_in_the_last_quarter_of_the_steps() -> None:
    maps = torch.rand(STEPS, 3, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    maps = maps * torch.tensor([1.0, 1.0, 9.0]).view(3, 1, 1, 1)
    last = maps[-2:, 1:, 1]  # the reference of phrase 1 of block 0; 6 / 4 is rounded up to 2
    standard = (last - last.mean(dim=(-2, -1), keepdim=True)) / last.std(dim=(-2, -1), keepdim=True)
    reference = standard.mean(dim=(0, 1)).flatten()
    expected = [torch.corrcoef(torch.stack([step[0, 1].flatten(), reference]))[0, 1] for step in maps]
    torch.testing.assert_close(agreement(maps)[0, 1].float(), torch.stack(expected).mean())


def test_constant_and_empty_maps_have_no_agreement() -> None:
    found = agreement(image(FLAT, SHARP, SHARP, torch.zeros(SIDE, SIDE)))[:, 0]
    assert found[0] == found[3] == 0
    assert found.isfinite().all()


def test_scores_are_averaged_over_the_images_whatever_their_numbers_of_phrases_and_steps() -> None:
    one, other = image(SHARP, noisy(SHARP)), image(DULL, noisy(DULL))[:3]
    two_phrases = torch.cat([other, other], dim=2)
    found = {score.block: score for score in rank([one, two_phrases]).scores}
    expected = (concentration(one)[0, 0] + 2 * concentration(other)[0, 0]) / 3
    assert found[0].concentration == pytest.approx(float(expected), abs=1e-4)


def test_the_best_blocks_are_at_most_five_and_agree() -> None:
    scores = [Score(block, 0.5, 0.5) for block in (9, 3, 7, 1, 8, 2)]
    assert Ranking(tuple(scores)).best == [1, 3, 7, 8, 9]
    assert Ranking((Score(4, 0.9, -0.2), *scores[:2])).best == [3, 9]
    assert Ranking((Score(4, 0.9, -0.2), Score(0, 0.1, -0.1))).best == [4]


@pytest.mark.exhaustive
def test_the_blocks_of_the_small_model_that_find_words_are_found() -> None:
    """Its model card has the correlation of the maps with the drawn objects: high in blocks 0 and 1 only."""
    pytest.importorskip("diffusers")
    from star_kernels.pipelines import load_pipeline
    from star_kernels.rank_blocks import rank_blocks

    pipeline: Any = load_pipeline("small")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle left of a blue square", "two green triangles and a yellow circle"]
    generator = torch.Generator().manual_seed(0)
    found = rank_blocks(pipeline, prompts, num_inference_steps=8, guidance_scale=2.5, generator=generator)
    assert found.best == [0, 1]
