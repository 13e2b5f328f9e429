"""Memory of a capture, with the block dimensions of SD3.5-M at 1024²."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps

GRID, TEXT, WIDTH = 64, 333, 1536


@pytest.mark.exhaustive
@torch.no_grad()
def test_capture_adds_less_than_one_percent_of_the_attention_of_a_block(peak_memory):
    model = diffusers.SD3Transformer2DModel(
        sample_size=2 * GRID,
        num_layers=1,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=64,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=64,
        pos_embed_max_size=2 * GRID,
        qk_norm="rms_norm",
    ).eval()
    block = model.transformer_blocks[0]
    block.ff = torch.nn.Identity()  # it needs more memory than attention, and would hide that of the capture
    inputs = {
        "hidden_states": torch.randn(1, 16, 2 * GRID, 2 * GRID),
        "encoder_hidden_states": torch.randn(1, TEXT, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.full((1,), 500.0),
    }
    selection = TokenSelection.from_positions([list(range(8))])
    with attach_maps(model, selection, cfg=None) as maps:

        def run():
            model(**inputs)
            return maps.value if maps.enabled else None

        with_maps = peak_memory(run)
        maps.enabled = False
        without = peak_memory(run)
    assert without > 4 * 4 * WIDTH * GRID * GRID  # query, key, value and output in float32
    assert with_maps < 1.01 * without
