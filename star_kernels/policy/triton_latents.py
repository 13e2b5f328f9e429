"""Code shared by the Triton kernels of the policy: tiles of latents, sums over channels, the terms of a location.

A program processes a tile [BLOCK_P, BLOCK_C] of positions and channels in any memory layout: the compiler turns strides
of one into 16-byte loads along that axis. The order of a sum over channels depends only on the number of channels (it
is written out as additions of elements), and no product is fused with a sum (LAUNCH). The sampling step and the loss
therefore compute the same log-probability to the last bit for all dtypes and layouts, and an on-policy ratio is exactly
one.

Launchers pass arguments by name. A pointer is None if its argument is not given, and kernels test for that while they
are compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

LAUNCH = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
_ELEMENTS = 2048  # elements of a tile: 8 per thread; more programs fit on a multiprocessor than with 16
_WIDEST = 64  # channels of a tile
_LONGEST = 512  # positions of a tile
_PROGRAMS = 1024  # of a forward pass: several per multiprocessor, but few enough for the last one to add up
BLOCK_B = tl.constexpr(8)  # samples that the last program adds up in one step
BLOCK_T = tl.constexpr(32)  # tiles of each of these samples

# Arguments whose values (1, or multiples of 16) must not start a compilation. Strides are left out: the width of loads
# depends on them.
SIZES = [
    "batch", "channels", "positions", "tiles", "columns", "phrases", "rows_of_location", "columns_of_location",
    "patch_frames", "patch_rows", "patch_columns", "grid_rows", "grid_columns", "old_is_scalar", "weighted_kl",
    "unreduced", "adaptive",
]  # fmt: skip
# Pointers whose alignment must not start a compilation: few numbers are read from each.
NUMBERS = ["p_weights", "p_step_weights", "p_old_log_prob", "p_grad_loss"]


@triton.jit
def load_tile(p_latent, stride_c, stride_p, o_p, o_c, m_tile):
    """Positions ``o_p`` and channels ``o_c`` of a sample as float32 [BLOCK_P, BLOCK_C], zero where masked."""
    p_tile = p_latent + o_p.to(tl.int64)[:, None] * stride_p + o_c.to(tl.int64)[None, :] * stride_c
    return tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def store_tile(b_tile, p_latent, stride_c, stride_p, o_p, o_c, m_tile):
    p_tile = p_latent + o_p.to(tl.int64)[:, None] * stride_p + o_c.to(tl.int64)[None, :] * stride_c
    tl.store(p_tile, b_tile.to(p_latent.dtype.element_ty), mask=m_tile)


@triton.jit
def load_transition(p_table, columns, o_b, m_b):
    """The rows of the table [6, columns] for samples ``o_b``: see star_kernels.Transition."""
    p_column = p_table + tl.where(columns == 1, 0, o_b)
    mean_sample = tl.load(p_column, mask=m_b, other=1.0)
    mean_output = tl.load(p_column + columns, mask=m_b, other=1.0)
    std = tl.load(p_column + 2 * columns, mask=m_b, other=1.0)
    scale = tl.load(p_column + 3 * columns, mask=m_b, other=1.0)
    offset = tl.load(p_column + 4 * columns, mask=m_b, other=1.0)
    kl_scale = tl.load(p_column + 5 * columns, mask=m_b, other=1.0)
    return mean_sample, mean_output, std, scale, offset, kl_scale


@triton.jit
def transition_mean(mean_sample, mean_output, b_x, b_v):
    return mean_sample * b_x + mean_output * b_v


@triton.jit
def log_density(b_squares, scale, offset, inverse_channels):
    """The log-probability of a location from the sum over channels of its squared residuals."""
    return offset - scale * (b_squares * inverse_channels)


@triton.jit
def add_channels(b_tile, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_P, BLOCK_C] -> [BLOCK_P]: neighbours first, in an order that no layout of the tile changes.

    The last two are left to a reduction, which has no other order: it keeps the layout that the result is wanted in,
    and that threads may share, from spreading back over the tile.
    """
    for level in tl.static_range(5):  # up to _WIDEST
        if (BLOCK_C >> level) > 2:
            b_even, b_odd = tl.split(tl.reshape(b_tile, [BLOCK_P, BLOCK_C >> (level + 1), 2]))
            b_tile = b_even + b_odd
    return tl.sum(b_tile, axis=1)


@triton.jit
def load_mask(p_mask, o_b, o_p, positions):
    """Which positions [BLOCK_P] count."""
    m_p = o_p < positions
    if p_mask is not None:
        m_p = tl.load(p_mask + o_b.to(tl.int64) * positions + o_p, mask=m_p, other=0) != 0
    return m_p


@triton.jit
def grid_cells(
    o_p, rows_of_location, columns_of_location, patch_frames, patch_rows, patch_columns, grid_rows, grid_columns
):
    """The cells [BLOCK_P] of the patch grid that positions lie in."""
    o_line, o_column = o_p // columns_of_location, o_p % columns_of_location
    o_frame, o_row = o_line // rows_of_location, o_line % rows_of_location
    return (o_frame // patch_frames * grid_rows + o_row // patch_rows) * grid_columns + o_column // patch_columns


@triton.jit
def load_weights(p_weights, o_row, o_cell, cells, m_p):
    """A row of weights [rows, cells], for each position [BLOCK_P]; ones without weights."""
    if p_weights is None:
        return tl.full(o_cell.shape, 1.0, dtype=tl.float32)
    else:
        return tl.load(p_weights + o_row.to(tl.int64) * cells + o_cell, mask=m_p, other=1.0)


@triton.jit
def clamp_advantage(advantage, advantage_clip):
    above = tl.where(advantage > advantage_clip, advantage_clip, advantage)
    return tl.where(above < -advantage_clip, -advantage_clip, above)  # a NaN stays


@triton.jit
def clipped_surrogate(log_ratio, advantage, clip_low, clip_high):
    """Ratio, max(-A rho, -A clip(rho)), its slope in log rho, and whether the ratio is outside the clip range.

    A ratio that overflows and is clipped has slope zero; a NaN is not clipped and stays visible.
    """
    ratio = tl.exp(log_ratio)
    free = -advantage * ratio
    free = tl.where(advantage * clip_high == 0.0, tl.where(ratio == float("inf"), 0.0, free), free)
    bounded = -advantage * tl.where(ratio < clip_low, clip_low, clip_high)
    outside = (ratio < clip_low) | (ratio > clip_high)
    bounds = outside & (bounded > free)
    return ratio, tl.where(bounds, bounded, free), tl.where(bounds, 0.0, free), outside


@triton.jit
def masked_surrogate(log_ratio, advantage, diverged):
    """Flow-DPPO's: ratio, -A rho, its slope, and whether the policy has diverged.

    Loss and slope are 0 where it has and the gradient leads further away. A NaN stays visible.
    """
    ratio = tl.exp(log_ratio)
    idle = advantage * tl.where(ratio == float("inf"), 1.0, ratio) == 0.0
    further = advantage * (ratio - 1.0) > 0.0
    value = tl.where(idle | (diverged & further), 0.0, -advantage * ratio)
    return ratio, value, value, diverged


@triton.jit
def weighted(b_weight, b_value):
    """weight * value; 0 for a weight of 0 and an infinite value. A NaN stays visible."""
    b_product = b_weight * b_value
    return tl.where(b_weight == 0.0, tl.where(tl.abs(b_value) == float("inf"), 0.0, b_product), b_product)


@triton.jit
def signed_surrogates(log_ratio, positive, negative, clip_low, clip_high):
    """The results of :func:`clipped_surrogate` for sums of W max(A, 0) and of W max(-A, 0), W not negative.

    Surrogates are positively homogeneous in A: theirs add up to positive * surrogate(1) + negative * surrogate(-1).
    """
    ratio, up, up_slope, outside = clipped_surrogate(log_ratio, 1.0, clip_low, clip_high)
    _, down, down_slope, _ = clipped_surrogate(log_ratio, -1.0, clip_low, clip_high)
    value = weighted(positive, up) + weighted(negative, down)
    return ratio, value, weighted(positive, up_slope) + weighted(negative, down_slope), outside


@triton.jit
def signed_masked(log_ratio, positive, negative, diverged):
    """The same of :func:`masked_surrogate`."""
    ratio, up, _, outside = masked_surrogate(log_ratio, 1.0, diverged)
    _, down, _, _ = masked_surrogate(log_ratio, -1.0, diverged)
    value = weighted(positive, up) + weighted(negative, down)
    return ratio, value, value, outside


@triton.jit
def last_to_arrive(p_counter):
    """Whether this is the last program of the launch to get here; it then sees all that the others have stored.

    Loads of those values must bypass the first-level cache (``load_sums``). The counter is left at zero.
    """
    tl.debug_barrier()  # all threads have stored before one of them increments the counter
    arrived = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == tl.num_programs(0) - 1
    if last:
        tl.store(p_counter, 0)
    return last


@triton.jit
def store_sum(p_partial, row, b_terms):
    """Stores the sum of this program's terms in a row of float64 [rows, programs]."""
    tl.store(p_partial + row * tl.num_programs(0) + tl.program_id(0), tl.sum(b_terms))


@triton.jit
def load_sums(p_tile, row, m_tile):
    """Sums [BLOCK_B, BLOCK_T] of a row, stored by other programs."""
    return tl.load(p_tile + row * tl.num_programs(0), mask=m_tile, other=0.0, cache_modifier=".cg")


@triton.jit
def reciprocal(x):
    """1 / x in float64, by two Newton steps from float32: a division would be a function call with its own stack."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y *= 2.0 - x * y
    return y * (2.0 - x * y)


@triton.jit
def inverse_count(b_counts, positions, m_b, p_mask):
    """One over the number of locations of each sample that count, [BLOCK_B]; 0 if there are none."""
    if p_mask is not None:
        b_count = tl.sum(b_counts, axis=1)
        return tl.where(b_count > 0.0, reciprocal(tl.maximum(b_count, 1.0)), 0.0)
    else:
        return tl.where(m_b, reciprocal(positions.to(tl.float64)), 0.0)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a latent seen as [batch, channels, positions], and its division into tiles."""

    batch: int
    channels: int
    positions: int

    @property
    def block_c(self) -> int:
        """Channels of a tile, a function of ``channels`` only: the order of their sum follows from it."""
        return min(_WIDEST, triton.next_power_of_2(self.channels))

    @property
    def block_p(self) -> int:
        return min(_LONGEST, _ELEMENTS // self.block_c)

    @property
    def tiles(self) -> int:
        """Tiles of a sample, one for each program."""
        return triton.cdiv(self.positions, self.block_p)

    @property
    def tiles_to_add(self) -> int:
        """Programs per sample when each may loop over several tiles and the last program adds up."""
        return min(self.tiles, max(1, _PROGRAMS // self.batch))

    @property
    def constants(self) -> dict[str, int]:
        """Tile, and a divisor of each size: if it is 8, no 16-byte access crosses the end of an axis."""
        return {
            "BLOCK_P": self.block_p,
            "BLOCK_C": self.block_c,
            "UNIT_P": 8 if self.positions % 8 == 0 else 1,
            "UNIT_C": 8 if self.channels % 8 == 0 else 1,
        }


def geometry(latent: Tensor, channel_dim: int) -> Geometry:
    batch, channels = latent.shape[0], latent.shape[channel_dim]
    return Geometry(batch, channels, latent.numel() // (batch * channels))


def latent_arguments(channel_dim: int, **latents: Tensor | None) -> dict[str, Any]:
    """``p_x``, ``stride_x_b``, ``stride_x_c`` and ``stride_x_p`` of each latent ``x``; None and zeros without one."""
    arguments: dict[str, Any] = {}
    for name, latent in latents.items():
        steps = (0, 0, 0) if latent is None else strides(latent, channel_dim)
        arguments[f"p_{name}"] = latent
        arguments[f"stride_{name}_b"], arguments[f"stride_{name}_c"], arguments[f"stride_{name}_p"] = steps
    return arguments


def strides(latent: Tensor, channel_dim: int) -> tuple[int, int, int]:
    """Strides of batch, channels and positions, in elements; the location dimensions collapse into one."""
    sizes, steps = latent.shape, latent.stride()
    position = 1
    for d in range(1, latent.ndim):
        if d != channel_dim and sizes[d] > 1:
            position = steps[d]  # of the innermost
    return steps[0] if sizes[0] > 1 else 0, steps[channel_dim] if sizes[channel_dim] > 1 else 0, position


def patch_arguments(latent: Tensor, channel_dim: int, grid: tuple[int, ...] | None) -> dict[str, int]:
    """Sizes of the locations, of a patch and of the grid that weights lie on; ones without a grid."""
    locations = [latent.shape[d] for d in range(1, latent.ndim) if d != channel_dim]
    sizes, cells = [1, 1, 1], [1, 1, 1]
    if grid is not None:
        missing = [1] * (3 - len(locations))
        sizes, cells = [*missing, *locations], [*missing, *grid]
    return {
        "rows_of_location": sizes[1],
        "columns_of_location": sizes[2],
        "patch_frames": sizes[0] // cells[0],
        "patch_rows": sizes[1] // cells[1],
        "patch_columns": sizes[2] // cells[2],
        "grid_rows": cells[1],
        "grid_columns": cells[2],
    }
