"""Maps of a small Wan pipeline with random weights, by ``star_kernels.maps``, and their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from local_tokenizers import t5_tokenizer
from PIL import Image
from transformers import UMT5Config, UMT5EncoderModel

from star_kernels import maps
from star_kernels.capture import capture_maps
from star_kernels.prompts import regions_of, select_tokens
from star_kernels.rank_blocks import rank_blocks

PROMPT = "a photo of a red bench and a blue teapot"
CALL = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
GRID = (3, 4, 6)  # (9 - 1) / 4 + 1 frames, and patches of 16 pixels


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()

    def transformer() -> Any:
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=16, num_layers=2, rope_max_seq_len=32,
        ).eval()  # fmt: skip

    encoder = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    found = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(encoder).eval(),
        transformer=transformer(),
        transformer_2=transformer(),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        boundary_ratio=0.7,
    )  # fmt: skip
    found.set_progress_bar_config(disable=True)
    return found


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def test_the_maps_are_those_of_the_conditional_passes_of_both_models(pipeline: Any) -> None:
    """With guidance, which is on by default, Wan runs an unconditional pass after the conditional one."""
    passes: list[tuple[Any, dict[str, Any]]] = []
    hooks = [
        model.register_forward_pre_hook(lambda model, _, kwargs: passes.append((model, kwargs)), with_kwargs=True)
        for model in (pipeline.transformer, pipeline.transformer_2)
    ]
    drawing = maps.draw(pipeline, PROMPT, phrases=["red bench"], generator=seeded(), output_type="pil", **CALL)
    for hook in hooks:
        hook.remove()
    assert drawing.maps.shape == (2, 1, *GRID)
    assert [model is pipeline.transformer for model, _ in passes] == [True, True, False, False]
    selection = select_tokens([PROMPT], regions_of(pipeline), source=["red bench"]).selection
    for step, (model, kwargs) in enumerate(passes[::2]):
        with capture_maps(model, selection) as captured:
            model(**kwargs)
        torch.testing.assert_close(drawing.maps[step], captured.value[0], rtol=0, atol=1e-6)
    assert len(drawing.image) == 9


def test_a_videos_maps_are_drawn_frame_by_frame(tmp_path: Path) -> None:
    moving = torch.zeros(2, 2, *GRID)
    for frame in range(3):
        moving[:, 0, frame, 1, 2 * frame] = moving[:, 1, frame, 3, 5 - frame] = 1.0
    frames = [Image.new("RGB", (96, 64), (20 * i, 90, 160)) for i in range(9)]
    drawing = maps.Drawing(frames, moving, ("red bench", "blue teapot"), [1.0, 0.5])
    paths = maps.write(drawing, PROMPT, tmp_path, {})
    assert [path.name for path in paths] == [
        "video.gif", "frames.png", "phrase-1.png", "phrase-2.png", "maps.npy", "maps.json",
    ]  # fmt: skip
    assert all(path.exists() for path in paths)
    assert Image.open(paths[0]).n_frames == 9
    assert np.load(paths[-2]).shape == (2, 2, *GRID)
    record = json.loads(paths[-1].read_text())
    assert record["shape"] == [2, 2, *GRID]
    assert record["steps"][0]["phrases"][0]["perplexity"] == pytest.approx(3)  # one position in each frame


def test_blocks_of_a_video_model_are_ranked_and_those_of_two_models_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="the blocks of one model can be ranked, got a pipeline of 2"):
        rank_blocks(pipeline, [PROMPT], **CALL)
    second, boundary = pipeline.transformer_2, pipeline.config.boundary_ratio
    pipeline.transformer_2 = None
    pipeline.register_to_config(boundary_ratio=None)
    try:
        ranking = rank_blocks(pipeline, [PROMPT], generator=seeded(), output_type="latent", **CALL)
    finally:
        pipeline.transformer_2 = second
        pipeline.register_to_config(boundary_ratio=boundary)
    assert sorted(score.block for score in ranking.scores) == [0, 1]
    assert all(0 <= score.concentration < 1 for score in ranking.scores)


def test_a_pipeline_without_a_callback_is_refused_in_one_sentence() -> None:
    from diffusers import HunyuanVideo15Pipeline

    with pytest.raises(
        ValueError, match="must accept callback_on_step_end, HunyuanVideo15Pipeline does not: use attach"
    ):
        maps.draw(HunyuanVideo15Pipeline.__new__(HunyuanVideo15Pipeline), PROMPT)
