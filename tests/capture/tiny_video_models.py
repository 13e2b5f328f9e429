"""A tiny random model of every video family, its inputs, and the layout of its attention calls."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_models import BATCH, Case, _time, _tokens
from torch import nn

FRAMES, ROWS, COLUMNS, TEXT = 3, 4, 5, 7
GRID = (FRAMES, ROWS, COLUMNS)
VIDEO = FRAMES * ROWS * COLUMNS
AUDIO = 9
QUOTED, PICTURE = 6, 4  # tokens of HunyuanVideo-1.5 for text in quotation marks and for a conditioning image
IN_QUOTES = 2  # of them in each sample
TEXT_OF_I2V = 512


def _latent(channels: int = 4) -> torch.Tensor:
    return torch.randn(BATCH, channels, FRAMES, 2 * ROWS, 2 * COLUMNS)


def _mask() -> torch.Tensor:
    """The second prompt is two tokens shorter."""
    return (torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT - 2]])).float()


def wan(**options: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=16, num_layers=2, rope_max_seq_len=32, **options,
    )  # fmt: skip


def wan_i2v() -> nn.Module:
    return wan(image_dim=8, added_kv_proj_dim=24)


def wan_inputs(text: int = TEXT) -> dict[str, Any]:
    return {"hidden_states": _latent(), "timestep": _time(500.0), "encoder_hidden_states": _tokens(text, 16)}


def wan_i2v_inputs() -> dict[str, Any]:
    return {**wan_inputs(TEXT_OF_I2V), "encoder_hidden_states_image": _tokens(PICTURE, 8)}


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip


def ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _tokens(VIDEO, 4),
        "encoder_hidden_states": _tokens(TEXT, 16),
        "timestep": _time(500.0),
        "encoder_attention_mask": _mask(),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
    }


def ltx2(**options: Any) -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False, **options,
    )  # fmt: skip


def ltx2_inputs() -> dict[str, Any]:
    return {
        **ltx_inputs(),
        "audio_hidden_states": _tokens(AUDIO, 4),
        "audio_encoder_hidden_states": _tokens(TEXT + 1, 16),  # keys of another number than those of the video
        "audio_num_frames": AUDIO,
    }


def hunyuan_video() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=1.0, patch_size=2, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip


def hunyuan_video_inputs() -> dict[str, Any]:
    return {
        **wan_inputs(),
        "encoder_attention_mask": _mask(),
        "pooled_projections": torch.randn(BATCH, 8),
        "guidance": _time(6000.0),
    }


def hunyuan_video15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_refiner_layers=1, mlp_ratio=1.0, patch_size=2, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip


def hunyuan_video15_inputs() -> dict[str, Any]:
    return {
        **wan_inputs(),
        "encoder_attention_mask": _mask(),
        "encoder_hidden_states_2": _tokens(QUOTED, 8),
        "encoder_attention_mask_2": (torch.arange(QUOTED) < IN_QUOTES).float().expand(BATCH, -1),
        "image_embeds": torch.zeros(BATCH, PICTURE, 8),
    }


VIDEO_CASES = {
    "wan": Case(wan, wan_inputs, (0, VIDEO), 0, keys=TEXT, grid=GRID),
    "ltx": Case(ltx, ltx_inputs, (0, VIDEO), 0, keys=TEXT, grid=GRID),
    "ltx2": Case(ltx2, ltx2_inputs, (0, VIDEO), 0, keys=TEXT, grid=GRID),
    "hunyuan-video": Case(hunyuan_video, hunyuan_video_inputs, (0, VIDEO), VIDEO, keys=VIDEO + TEXT, grid=GRID),
}
# Whose masks differ by query.
HUNYUAN_VIDEO15 = Case(
    hunyuan_video15, hunyuan_video15_inputs, (0, VIDEO), VIDEO + IN_QUOTES, keys=VIDEO + TEXT + QUOTED + PICTURE,
    grid=GRID,
)  # fmt: skip
WAN_I2V = Case(wan_i2v, wan_i2v_inputs, (0, VIDEO), 0, keys=TEXT_OF_I2V, grid=GRID)
VIDEO_CASES |= {"hunyuan-video-1.5": HUNYUAN_VIDEO15, "wan-i2v": WAN_I2V}
