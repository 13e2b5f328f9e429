"""``python -m star_kernels.maps`` on a small SD3 pipeline with random weights, saved to a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from local_tokenizers import clip_tokenizer, t5_tokenizer
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from star_kernels import maps
from star_kernels.capture import capture_maps
from star_kernels.generation import doubles
from star_kernels.pipelines import load_pipeline
from star_kernels.prompts import regions_of, select_tokens
from star_kernels.rank_blocks import rank, rank_blocks

PROMPT = "a photo of a red bench and a blue teapot"
SIZE = 64  # pixels: 32 x 32 latents, 16 x 16 patches


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, shift_factor=0.0,
        ),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
        ),
        tokenizer_3=t5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(where)
    return where


def run(folder: Path, out: Path, *more: str) -> int:
    command = ["--model", str(folder), "--prompt", PROMPT, "--out", str(out), "--steps", "3", "--device", "cpu", *more]
    return maps.main(command)


def test_the_command_writes_images_maps_and_statistics(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert run(folder, out, "--phrase", "red bench", "--phrase", "blue teapot", "--height", "64", "--width", "48") == 0
    assert sorted(p.name for p in out.iterdir()) == ["image.png", "maps.json", "maps.npy", "phrases.png", "strip.png"]
    assert Image.open(out / "image.png").size == (48, 64)
    values = np.load(out / "maps.npy")
    assert values.shape == (3, 2, 16, 12)
    record = json.loads((out / "maps.json").read_text())
    assert record["phrases"] == ["red bench", "blue teapot"]
    assert record["shape"] == list(values.shape)
    assert [step["sigma"] for step in record["steps"]] == sorted((s["sigma"] for s in record["steps"]), reverse=True)
    for step, grids in zip(record["steps"], values, strict=True):
        for summary, grid in zip(step["phrases"], grids, strict=True):
            assert summary["mean"] == pytest.approx(grid.mean(), abs=1e-7)
            assert summary["maximum"] == pytest.approx(grid.max(), abs=1e-7)
            assert 1 <= summary["perplexity"] <= 16 * 12


def test_the_core_content_is_mapped_by_default(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path, "--height", "64", "--width", "64") == 0
    phrases = json.loads((tmp_path / "maps.json").read_text())["phrases"]
    assert [word for word in ("red", "bench", "blue", "teapot") if word in " ".join(phrases)] == [
        "red", "bench", "blue", "teapot",
    ]  # fmt: skip


def test_the_included_model_is_called_small(tmp_path: Path) -> None:
    prompt = ["--prompt", "a red circle left of a blue square", "--phrase", "red circle"]
    assert maps.main(["--model", "small", *prompt, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert np.load(tmp_path / "maps.npy").shape == (2, 1, 8, 8)


def test_the_maps_are_those_of_the_conditional_pass(pipeline: Any) -> None:
    """Compared at the first step with a call of the transformer as the pipeline makes it."""
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "guidance_scale": 5.0}
    drawing = maps.draw(pipeline, PROMPT, phrases=["red bench"], generator=torch.Generator().manual_seed(3), **call)
    embeddings = pipeline.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    selection = select_tokens([PROMPT], regions_of(pipeline), source=["red bench"]).selection
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    with capture_maps(pipeline.transformer, selection, cfg=None) as captured, torch.no_grad():
        pipeline.transformer(
            hidden_states=latents, encoder_hidden_states=embeddings[0], pooled_projections=embeddings[2],
            timestep=pipeline.scheduler.timesteps[:1],
        )  # fmt: skip
    torch.testing.assert_close(drawing.maps[0], captured.value[0], rtol=1e-4, atol=1e-6)
    assert drawing.names == ("red bench",)
    assert drawing.maps.shape == (2, 1, 16, 16)


def test_blocks_are_ranked_by_maps_of_every_block(
    pipeline: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": 2}
    options = ["--height", str(SIZE), "--width", str(SIZE), "--rank-blocks", "--steps", "2"]
    assert run(folder, tmp_path, *options, "--prompt", "a blue teapot") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["blocks.json"]
    record = json.loads((tmp_path / "blocks.json").read_text())
    assert record["prompts"] == [PROMPT, "a blue teapot"]
    printed = capsys.readouterr().out
    assert f"blocks={record['blocks']}\n" in printed
    generator = torch.Generator().manual_seed(0)
    images = []
    for prompt in record["prompts"]:
        state = generator.get_state()
        by_block = []
        for block in range(2):
            generator.set_state(state)
            by_block.append(maps.draw(pipeline, prompt, blocks=[block], generator=generator, **call).maps)
        images.append(torch.stack(by_block, dim=1))
    expected = rank(images).as_dict()
    assert record["blocks"] == expected["blocks"]
    assert [score["block"] for score in record["scores"]] == [score["block"] for score in expected["scores"]]
    for found, score in zip(record["scores"], expected["scores"], strict=True):
        assert found == pytest.approx(score, abs=2e-4)
        assert f"{found['concentration']:.3f}" in printed
    assert not pipeline.transformer._forward_hooks


def test_prompts_and_blocks_that_do_not_fit_the_mode_are_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (["--prompt", "a cat"], "--prompt must be given once, got 2 prompts; --rank-blocks accepts several"),
        (["--rank-blocks", "--blocks", "all"], "--rank-blocks ranks all blocks and does not accept --blocks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(folder, tmp_path, *more)
        assert message in capsys.readouterr().err


def test_bad_prompts_and_models_of_one_block_cannot_be_ranked(pipeline: Any) -> None:
    for prompts in ("a cat", []):
        with pytest.raises(ValueError, match="prompts must be a list of at least one prompt"):
            rank_blocks(pipeline, prompts)
    blocks = pipeline.transformer.transformer_blocks
    pipeline.transformer.transformer_blocks = blocks[-1:]
    with pytest.raises(ValueError, match="at least two attention blocks to rank, got 1"):
        rank_blocks(pipeline, [PROMPT])
    pipeline.transformer.transformer_blocks = blocks


@pytest.mark.exhaustive
def test_equal_seeds_draw_equal_maps(folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("first", "second", "third")]
    for out, seed in zip(outs, ("7", "7", "8"), strict=True):
        assert run(folder, out, "--seed", seed, "--height", "64", "--width", "64") == 0
    first, second, third = (np.load(out / "maps.npy") for out in outs)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_the_model_is_restored(pipeline: Any) -> None:
    before = dict(pipeline.transformer.attn_processors)
    with pytest.raises(ValueError, match="green dog"):
        maps.draw(pipeline, PROMPT, phrases=["green dog"], num_inference_steps=1)
    maps.draw(pipeline, PROMPT, height=SIZE, width=SIZE, num_inference_steps=1)
    after = pipeline.transformer.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert not pipeline.transformer._forward_hooks
    assert not pipeline.transformer._forward_pre_hooks


def test_bad_input_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path, "--phrase", "green dog") == 2
    assert "green dog" in capsys.readouterr().err
    assert run(tmp_path, tmp_path) == 2
    assert "--model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--blocks", "first")
    assert '"all", "default" or indices' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be an integer of at least 1, got '0'"),
        ("--steps", "2.5", "must be an integer of at least 1, got '2.5'"),
        ("--guidance", "-1", "must be a number of at least 0, got '-1'"),
        ("--guidance", "nan", "must be a number of at least 0, got 'nan'"),
        ("--guidance", "inf", "must be a number of at least 0, got 'inf'"),
        ("--height", "0", "must be an integer of at least 1, got '0'"),
        ("--width", "-8", "must be an integer of at least 1, got '-8'"),
        ("--seed", str(2**64), f"must be an integer of at least -{2**63} and at most {2**64 - 1}, got '{2**64}'"),
        ("--device", "gpu", "must be a torch device available here, got 'gpu'"),
        ("--prompt", " ", "must not be blank, got ' '"),
        ("--prompt", "a \udce9 b", "must be Unicode text"),
        ("--phrase", "", "must not be blank, got ''"),
    ],
)
def test_an_invalid_value_is_an_error_before_anything_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setattr(maps, "load_pipeline", lambda *arguments: pytest.fail("the model is loaded"))
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, tmp_path / "out", option, value)
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_an_unwritable_folder_is_an_error_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "load_pipeline", lambda *arguments: pytest.fail("the model is loaded"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert run(tmp_path, out) == 2
        assert f"--out must be a writable folder, got '{out}'" in capsys.readouterr().err


def test_unsupported_image_sizes_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path, "--height", "63", "--width", "64") == 2
    assert "`height` and `width` have to be divisible by 4 but are 63 and 64" in capsys.readouterr().err


def test_zero_steps_are_an_error(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        maps.draw(pipeline, PROMPT, num_inference_steps=0, height=SIZE, width=SIZE)


def test_paths_of_the_home_folder_are_expanded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    options = maps._parser().parse_args(["--model=~/pipeline", "--prompt", PROMPT, "--out=~/out"])
    assert (options.model, options.out) == (f"{folder.parent}/pipeline", folder.parent / "out")


def test_a_missing_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert run(folder, tmp_path) == 2
    assert "star_kernels.maps requires the extras diffusers and figures" in capsys.readouterr().err


def test_only_pipelines_of_stable_diffusion_double_the_batch(pipeline: Any) -> None:
    """FLUX takes guidance as an input, and Qwen-Image runs a separate pass."""

    class FluxPipeline:
        pass

    assert doubles(pipeline, {})
    assert not doubles(pipeline, {"guidance_scale": 1.0})
    assert not doubles(FluxPipeline(), {"guidance_scale": 3.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_images_per_prompt": 2},
            "num_images_per_prompt must be 1, because maps are drawn of one generation, got 2",
        ),
        ({"phrases": []}, r"phrases must be a list of at least one phrase, such as \['red bench'\], got \[\]"),
        ({"phrases": "red bench"}, "phrases must be a list of at least one phrase.*got 'red bench'"),
    ],
)
def test_what_draw_cannot_draw_is_an_error(pipeline: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maps.draw(pipeline, "a red bench", **options)


def test_a_misspelt_name_of_the_small_model_says_what_is_accepted() -> None:
    with pytest.raises(OSError, match=r'path must be "small", a local folder or the id OWNER/NAME .* got \'smal\''):
        load_pipeline("smal")


def test_an_abbreviated_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        maps.main(["--model", "small", "--prompt", "a red bench", "--out", "unused", "--step", "3"])
    assert "unrecognized arguments: --step; did you mean --steps?" in capsys.readouterr().err


def test_a_misspelt_required_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        maps.main(["--model", "small", "--promt=a red bench", "--out", "unused"])
    assert "unrecognized arguments: --promt; did you mean --prompt?" in capsys.readouterr().err


def test_a_phrase_that_no_prompt_contains_is_an_error_before_the_pipeline_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tmp_path / "absent"), "--out", str(tmp_path), "--prompt", "a red bench"]
    assert maps.main([*arguments, "--phrase", "blue teapot"]) == 2
    assert "--phrase: phrases must occur in the prompt, got 'blue teapot'" in capsys.readouterr().err


def test_a_family_that_doubles_the_batch_is_drawn_with_guidance(pipeline: Any) -> None:
    """AuraFlow, as Sana, HiDream and Z-Image, which are not Stable Diffusion."""
    torch.manual_seed(0)
    aura_flow = AuraFlowPipeline(
        tokenizer=pipeline.tokenizer_3,
        text_encoder=pipeline.text_encoder_3,
        vae=pipeline.vae,
        transformer=AuraFlowTransformer2DModel(
            sample_size=32, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=256,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    options: dict[str, Any] = {"phrases": ["red bench"], "height": SIZE, "width": SIZE, "num_inference_steps": 2}
    for scale in (1.0, 4.0):
        drawn = maps.draw(aura_flow, PROMPT, guidance_scale=scale, **options)
        assert drawn.maps.shape == (2, 1, SIZE // 4, SIZE // 4)
        assert drawn.maps.any()
