"""Regions of video pipelines agree with their own ``encode_prompt``, with encoders that return token ids."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_tokenizers import qwen_tokenizer, t5_tokenizer
from torch import Tensor, nn

from star_kernels.prompts import phrases, regions_of, select_tokens

diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a RED bench by a lamp", "two benches, one of them a red bench on a wooden boat, and a lamp"]
WORDS = ["red", "lamp"]


class Encoder(nn.Module):
    """A text encoder whose hidden states are token ids."""

    dtype = torch.float32
    device = torch.device("cpu")
    config = SimpleNamespace(d_model=1)

    def forward(self, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        states = input_ids[..., None].float()
        return Output(last_hidden_state=states, hidden_states=(states,) * 4, pooler_output=states[:, 0])


class Output(SimpleNamespace):
    def __getitem__(self, item: int) -> Tensor:
        return self.last_hidden_state


def made(pipeline_class: Any, **parts: Any) -> Any:
    absent = {"vae": None, "scheduler": None, "transformer": None}
    return pipeline_class(**{**absent, **parts})


def wan() -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    pipeline = made(diffusers.WanPipeline, tokenizer=t5_tokenizer(), text_encoder=Encoder())
    return pipeline, lambda p, prompts: p.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=512, device="cpu"
    )[0]


def ltx() -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    pipeline = made(diffusers.LTXPipeline, tokenizer=t5_tokenizer(), text_encoder=Encoder())
    return pipeline, lambda p, prompts: p.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")[0]


def ltx2() -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    from diffusers.pipelines.ltx2.connectors import LTX2ConnectorTransformer1d

    connector = LTX2ConnectorTransformer1d(1, 4, num_layers=0, num_learnable_registers=128)
    with torch.no_grad():
        connector.learnable_registers.zero_()
    connector.norm_out = nn.Identity()
    pipeline = made(
        diffusers.LTX2Pipeline,
        audio_vae=None,
        vocoder=None,
        connectors=None,
        tokenizer=qwen_tokenizer(),
        text_encoder=Encoder(),
    )
    pipeline.connectors = SimpleNamespace(video_connector=connector)

    def encode(p: Any, prompts: list[str]) -> Tensor:
        states, mask, *_ = p.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
        additive = (mask - 1).float()[:, None, None] * torch.finfo(torch.float32).max
        return connector(states[..., :1].expand(-1, -1, 4), additive)[0]

    return pipeline, encode


TEMPLATE = "<|im_start|>describe the video: a lamp and a red cart <|im_end|>{}<|im_end|>"


class Hunyuan(diffusers.HunyuanVideoPipeline):  # type: ignore[misc, name-defined]
    """With a short template of the local tokenizer: its default is longer than the text with this tokenizer."""

    def encode_prompt(self, prompt: Any, prompt_template: Any = {"template": TEMPLATE, "crop_start": 9}) -> Any:  # noqa: B006
        return super().encode_prompt(prompt, prompt_template=prompt_template, device="cpu")


def hunyuan_video() -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    encoders = {"text_encoder": Encoder(), "text_encoder_2": Encoder()}
    pipeline = made(Hunyuan, tokenizer=qwen_tokenizer(), tokenizer_2=qwen_tokenizer(), **encoders)
    pipeline.tokenizer_2 = t5_tokenizer()
    return pipeline, lambda p, prompts: p.encode_prompt(prompts)[0]


def hunyuan_video15() -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    vae = nn.Module()
    vae.config, vae.temporal_compression_ratio, vae.spatial_compression_ratio = (
        SimpleNamespace(latent_channels=4),
        4,
        16,
    )
    pipeline = made(
        diffusers.HunyuanVideo15Pipeline,
        vae=vae,
        guider=None,
        tokenizer=qwen_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        text_encoder=Encoder(),
        text_encoder_2=Encoder(),
    )
    return pipeline, lambda p, prompts: p.encode_prompt(prompts, device="cpu", batch_size=len(prompts))[0]


PIPELINES = {"wan": wan, "ltx": ltx, "ltx2": ltx2, "hunyuan-video": hunyuan_video, "hunyuan-video-1.5": hunyuan_video15}
LENGTHS = {"wan": 512, "ltx": 128, "ltx2": 1024, "hunyuan-video": 256, "hunyuan-video-1.5": 1000}


@pytest.fixture(autouse=True)
def no_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's cleaning without ftfy, whether it is installed or not."""
    monkeypatch.setattr(sys.modules[diffusers.WanPipeline.__module__], "is_ftfy_available", lambda: False)


def words_at(pipeline: Any, encode: Callable[[Any, list[str]], Tensor], prompts: list[str]) -> list[str]:
    """The text of the tokens at the selected positions of the pipeline's embeddings."""
    (region,) = regions_of(pipeline)
    selection, _ = select_tokens(prompts, [region], source=WORDS)
    embeddings = encode(pipeline, prompts)
    found = []
    for b in range(len(prompts)):
        positions = [int(p) for p in selection.index[b] if p >= 0]
        found.append(region.tokenizer.decode([int(embeddings[b, p, 0]) for p in positions]))
    return found


@pytest.mark.parametrize("family", list(PIPELINES))
def test_the_embeddings_at_the_selected_positions_are_those_of_the_words(family: str) -> None:
    pipeline, encode = PIPELINES[family]()
    for prompt, text in zip(PROMPTS, words_at(pipeline, encode, PROMPTS), strict=True):
        assert text.lower().split() == " ".join(phrases(prompt, WORDS).words).lower().split()
    (region,) = regions_of(pipeline)
    assert region.length == LENGTHS[family]
    assert encode(pipeline, PROMPTS).shape[1] == region.length
    assert regions_of(pipeline, max_sequence_length=64)[0].length == 64


@pytest.mark.parametrize("prompt", ["  a red \n\n  bench by a\tlamp ", "a \u201cred\u201d bench,\u00a0a lamp"])
def test_wans_whitespace_and_quotes_are_cleaned_and_the_words_still_found(
    prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[diffusers.WanPipeline.__module__]
    monkeypatch.setattr(module, "is_ftfy_available", lambda: True)
    straight = SimpleNamespace(fix_text=lambda text: text.replace("\u201c", '"').replace("\u201d", '"'))
    monkeypatch.setattr(module, "ftfy", straight, raising=False)
    pipeline, encode = wan()
    assert words_at(pipeline, encode, [prompt])[0].replace('"', "").split() == ["red", "lamp"]


def test_a_prompt_that_wan_rewrites_otherwise_is_an_error() -> None:
    pipeline, _ = wan()
    with pytest.raises(ValueError, match="prompt must not contain text that the pipeline rewrites, such as HTML"):
        select_tokens(["a red bench &amp; a lamp"], regions_of(pipeline), source=WORDS)


def test_pipelines_whose_positions_are_unknown_are_errors() -> None:
    pipeline, _ = ltx2()
    pipeline.connectors = SimpleNamespace(video_connector=SimpleNamespace(learnable_registers=None))
    with pytest.raises(ValueError, match="connectors must have learnable registers"):
        regions_of(pipeline)
    pipeline, _ = hunyuan_video15()
    pipeline.tokenizer = qwen_tokenizer("left")
    with pytest.raises(ValueError, match="tokenizer must have padding_side 'right'"):
        regions_of(pipeline)


def test_defaults_of_the_published_pipelines() -> None:
    template = diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    pipeline = made(
        diffusers.HunyuanVideoPipeline, tokenizer=qwen_tokenizer(), tokenizer_2=None, text_encoder=None,
        text_encoder_2=None,
    )  # fmt: skip
    (region,) = regions_of(pipeline)
    assert (region.dropped, region.prefix + "{}" + region.suffix) == (95, template["template"])
    condition = made(diffusers.LTXConditionPipeline, tokenizer=t5_tokenizer(), text_encoder=None)
    assert regions_of(condition)[0].length == 256
