"""The mean of maps over blocks and heads, which is taken once, when maps are read.

A GPU kernel writes maps per head at no cost, and a mean over heads is one more launch in every block. So detached maps
are kept per head until they are read, unless they would use much memory: then attention takes so long that the launch
does not count. On a CPU the kernel adds up the heads at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.capture.family import Grid
from star_kernels.capture.passes import ForwardPass

HEADS_BYTES = 64 << 20  # of the maps per head that the blocks of a forward pass keep


def keeps_heads(forward_pass: ForwardPass, query: Tensor) -> bool:
    """Whether the maps of an attention call are kept per head, ``[batch, G, H, R]``."""
    if not query.is_cuda or not forward_pass.detached:
        return False
    batch, phrases, _ = forward_pass.selection.weight.shape
    rows = query.shape[2] if forward_pass.rows is None else forward_pass.rows[1]
    return bool(4 * forward_pass.detached * batch * phrases * query.shape[1] * rows <= HEADS_BYTES)


def mean_maps(found: Sequence[Tensor], grid_of: Callable[[int], Grid]) -> Tensor:
    """``[B, G, h, w]``, of a video ``[B, G, f, h, w]``: the mean over blocks and heads, on the finest of their grids.

    Args:
        found: of each block, ``[B, G, R]`` or per head ``[B, G, H, R]``.
        grid_of: rows and columns, or frames, rows and columns, in maps of R positions.
    """
    finest = max(grid_of(maps.shape[-1]) for maps in found)
    alike: dict[torch.Size, list[Tensor]] = {}
    for maps in found:
        alike.setdefault(maps.shape, []).append(maps)
    parts = []
    for shape, blocks in alike.items():
        mean = torch.stack(blocks).mean(dim=(0, 3) if len(shape) == 4 else 0)
        part = _on_grid(mean, grid_of(shape[-1]), finest)
        parts.append(part if len(alike) == 1 else part * (len(blocks) / len(found)))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def _on_grid(maps: Tensor, grid: Grid, finest: Grid) -> Tensor:
    """``[B, G, R]`` to ``[B, G, *grid]``, interpolated to the finest grid."""
    if prod(grid) > maps.shape[-1]:
        sizes = " x ".join(map(str, grid))
        raise ValueError(f"grid must have at most {maps.shape[-1]} positions, the image rows, got {sizes}")
    maps = maps[..., : prod(grid)].unflatten(-1, grid)
    return maps if grid == finest else F.interpolate(maps, finest, mode="trilinear" if len(grid) == 3 else "bilinear")
