"""Tiny random models in the format of real ones, and a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor


def letters() -> dict[str, int]:
    """A vocabulary of characters, for a tokenizer without merges."""
    characters = [chr(code) for code in range(33, 127)]
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 32-pixel images and 24 features in a folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = letters()
    end = vocabulary["<|endoftext|>"]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(vocabulary), "max_position_embeddings": 77, "bos_token_id": end - 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": end, "pad_token_id": end},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # the first initialisation is so small that all features are alike
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = transformers.CLIPTokenizerFast.from_pretrained(folder, model_max_length=77)
    transformers.CLIPProcessor(images, tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of three classes in a folder, with an image processor for 64 pixels."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    labels = {0: "mouse", 1: "bench", 2: "clock"}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
    )
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> Tensor:
    """Four images, float32 ``[4, 3, 40, 48]``, that differ in every pixel."""
    return torch.rand(4, 3, 40, 48, generator=torch.Generator().manual_seed(1))
