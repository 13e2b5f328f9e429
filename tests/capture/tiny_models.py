"""A tiny random model of every family, its inputs, and the layout of its attention calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from star_kernels import TokenSelection

ROWS, COLUMNS, TEXT, BATCH = 6, 10, 7, 2
IMAGE = ROWS * COLUMNS
JOINT = IMAGE + TEXT


@dataclass(frozen=True)
class Case:
    """One family. ``keys`` distinguishes its captured attention calls from others."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    rows: tuple[int, int]  # in the queries
    text: int  # where the text starts in the keys
    keys: int = JOINT
    options: dict[str, Any] = field(default_factory=dict)  # of capture_maps
    grid: tuple[int, ...] = (ROWS, COLUMNS)

    def make(self) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        model = self.build().eval()
        for name, parameter in model.named_parameters():  # also those that start at zero
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
            else:
                nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
        return model, self.inputs()

    @property
    def selection(self) -> TokenSelection:
        return TokenSelection.from_positions([[[0], [1, 2]], [[3], []]])


def _tokens(count: int, width: int) -> Tensor:
    return torch.randn(BATCH, count, width)


def _time(value: float = 0.5) -> Tensor:
    return torch.full((BATCH,), value)


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        **{"num_layers": 3, **options},
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=64,
    )


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 4, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": _tokens(TEXT, 32),
        "pooled_projections": torch.randn(BATCH, 16),
        "timestep": _time(500.0),
    }


def _ids(axes: int, references: int = 0) -> Tensor:
    ids = torch.zeros(IMAGE, axes)
    ids[:, 1] = torch.arange(IMAGE) // COLUMNS
    ids[:, 2] = torch.arange(IMAGE) % COLUMNS
    reference = ids[:references].clone()
    reference[:, 0] = 1
    return torch.cat([ids, reference])


def flux(**options: Any) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        **{"num_layers": 1, "num_single_layers": 2, **options},
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs(references: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": _tokens(IMAGE + references, 4),
        "encoder_hidden_states": _tokens(TEXT, 32),
        "pooled_projections": torch.randn(BATCH, 16),
        "timestep": _time(),
        "img_ids": _ids(3, references),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def flux2_inputs() -> dict[str, Any]:
    text = torch.zeros(BATCH, TEXT, 4)
    text[..., 3] = torch.arange(TEXT)
    return {
        "hidden_states": _tokens(IMAGE, 4),
        "encoder_hidden_states": _tokens(TEXT, 32),
        "timestep": _time(),
        "guidance": _time(),
        "img_ids": _ids(4).expand(BATCH, -1, -1),
        "txt_ids": text,
    }


def qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def qwen_image_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _tokens(IMAGE, 4),
        "encoder_hidden_states": _tokens(TEXT, 32),
        "encoder_hidden_states_mask": torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT - 2]]),
        "timestep": _time(),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * BATCH,
    }


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
        use_additional_conditions=False,
    )


def pixart_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, 4, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": _tokens(TEXT, 32),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT - 2]])).float(),
        "timestep": _time(500.0),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def unet(**options: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )


def unet_inputs() -> dict[str, Any]:
    return {
        "sample": torch.randn(BATCH, 4, ROWS, COLUMNS),
        "encoder_hidden_states": _tokens(TEXT, 32),
        "timestep": _time(500.0),
    }


def sdxl() -> nn.Module:
    return unet(
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    )


def sdxl_inputs() -> dict[str, Any]:
    added = {"text_embeds": torch.randn(BATCH, 16), "time_ids": torch.randn(BATCH, 6)}
    return {**unet_inputs(), "added_cond_kwargs": added}


def cogview4() -> nn.Module:
    return diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=32,
        sample_size=32,
        rope_axes_dim=(32, 32),
    )


def cogview4_inputs() -> dict[str, Any]:
    sizes = {name: torch.zeros(BATCH, 2) for name in ("original_size", "target_size", "crop_coords")}
    return {**text_and_latent(), **sizes}


def text_and_latent() -> dict[str, Any]:
    return {name: value for name, value in sd3_inputs().items() if name != "pooled_projections"}


def hunyuan_image() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(2, 2),
        text_embed_dim=32,
        rope_axes_dim=(8, 8),
    )


def hunyuan_image_inputs() -> dict[str, Any]:
    mask = qwen_image_inputs()["encoder_hidden_states_mask"]
    return {**text_and_latent(), "encoder_attention_mask": mask}


CASES = {
    "sd3": Case(sd3, sd3_inputs, (0, IMAGE), IMAGE),
    "sd3.5": Case(lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"), sd3_inputs, (0, IMAGE), IMAGE),
    "flux": Case(flux, flux_inputs, (TEXT, IMAGE), 0),
    "flux2": Case(flux2, flux2_inputs, (TEXT, IMAGE), 0),
    "qwen-image": Case(qwen_image, qwen_image_inputs, (TEXT, IMAGE), 0),
    "pixart": Case(pixart, pixart_inputs, (0, IMAGE), 0, keys=TEXT),
    "sd": Case(unet, unet_inputs, (0, IMAGE), 0, keys=TEXT),
    "sdxl": Case(sdxl, sdxl_inputs, (0, IMAGE), 0, keys=TEXT),
    "any-joint": Case(
        cogview4,
        cogview4_inputs,
        (TEXT, IMAGE),
        0,
        options={"rows": (TEXT, IMAGE), "grid": (ROWS, COLUMNS), "text": (0, TEXT)},
    ),
}
