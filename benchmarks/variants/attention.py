"""Ways to get attention and the mass on a few selected tokens: ours, and what people would do otherwise.

Every variant computes the attention output too. In a joint sequence the rows of the map are the image tokens and the
selected tokens are text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing.harness import Extent, Variant
from star_kernels import TokenSelection, attention, attention_maps
from star_kernels.attention import choose_backend, naive, tuning

SELECTED = 8
VENDORS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
           "cudnn": SDPBackend.CUDNN_ATTENTION}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A joint self-attention of image and text tokens."""

    name: str
    batch: int
    heads: int
    head_dim: int
    image: int
    text: int
    image_first: bool = True
    note: str = ""

    @property
    def sequence(self) -> int:
        return self.image + self.text

    @property
    def rows(self) -> tuple[int, int]:
        return (0 if self.image_first else self.text, self.image)

    @property
    def first_text(self) -> int:
        return self.image if self.image_first else 0

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {self.heads} heads x {self.head_dim}, {self.sequence} tokens"


SD35_512 = Shape("SD3.5-M 512²", 2, 24, 64, 1024, 333)
SD35_1024 = Shape("SD3.5-M 1024²", 1, 24, 64, 4096, 333)
FLUX_1024 = Shape("FLUX 1024²", 1, 24, 128, 4096, 512, image_first=False)


def shapes_for(device: torch.device, batch: int | None, extent: Extent) -> list[Shape]:
    """The models' shapes: larger batches on a GPU, a third of the heads at 1024² on a CPU (heads are independent)."""
    if extent == "quick":
        return [Shape("smoke test", batch or 1, 2, 64, 256, 77)]
    if device.type == "cuda":
        batches = ((SD35_512, 2), (SD35_512, 16), (SD35_1024, 2), (SD35_1024, 16), (FLUX_1024, 2))
        chosen = [replace(s, batch=batch or b) for s, b in batches]
        return list(dict.fromkeys(chosen))
    note = "8 of the model's 24 heads, to fit the time on a CPU: heads are independent of one another"
    shapes = [
        replace(SD35_512, batch=batch or SD35_512.batch),
        replace(SD35_1024, batch=batch or 1, heads=8, note=note),
        replace(FLUX_1024, batch=batch or 1, heads=8, note=note),
    ]
    return shapes if extent == "thorough" else shapes[:2]


@dataclass(frozen=True)
class Inputs:
    shape: Shape
    query: Tensor  # [B, H, S, D]
    key: Tensor
    value: Tensor
    selection: TokenSelection

    @property
    def scale(self) -> float:
        return float(self.shape.head_dim**-0.5)

    @property
    def positions(self) -> Tensor:
        """int64 [B, T]."""
        return self.selection.index.long()

    @property
    def others(self) -> Tensor:
        """int64 [B, S - T]: the keys that are not selected."""
        batch, slots = self.selection.index.shape
        kept = torch.ones(batch, self.shape.sequence, dtype=torch.bool, device=self.query.device)
        kept.scatter_(1, self.positions, False)
        return kept.nonzero()[:, 1].view(batch, self.shape.sequence - slots)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normalised queries and keys as qk-norm leaves them, eight text tokens selected, others in each sample."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.heads, shape.sequence, shape.head_dim)
    query, key, value = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(3))
    tokens = [torch.randperm(shape.text, generator=generator)[:SELECTED].sort().values for _ in range(shape.batch)]
    positions = [(t + shape.first_text).tolist() for t in tokens]
    return Inputs(shape, query, key, value, TokenSelection.from_positions(positions).to(device))


def backend_of(inputs: Inputs) -> str:
    """The backend of "auto": on a GPU the kernel that its plan names for the forward pass."""
    backend = choose_backend(inputs.query.device.type, inputs.query.dtype, inputs.shape.head_dim)
    if backend != "auto":
        return backend
    length = inputs.shape.sequence
    return tuning.plan(inputs.query.device, inputs.query.dtype, inputs.shape.head_dim, length, length).forward


def ours(x: Inputs) -> tuple[Tensor, Tensor]:
    result = attention(x.query, x.key, x.value, x.selection, rows=x.shape.rows)
    return result.out, result.maps


def ours_without_maps(x: Inputs) -> Tensor:
    """Our own kernel asked for no maps; only the Triton backend has one that is not PyTorch's attention."""
    from star_kernels.attention import triton_forward

    out: Tensor = triton_forward.attention(
        x.query, x.key, x.value, None, None, None, x.shape.rows, x.scale, True
    )[0]  # fmt: skip
    return out


def ours_from_lse(x: Inputs) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention with its log-sum-exp, then our map kernel."""
    out, lse = with_lse(x.query, x.key, x.value, x.scale)
    return out, attention_maps(x.query, x.key, lse, x.selection, rows=x.shape.rows)


def lse_difference(x: Inputs, others: Tensor) -> tuple[Tensor, Tensor]:
    """Fused attention again without the selected keys: mass = 1 - exp(lse_without - lse_all), image rows only."""
    out, lse = with_lse(x.query, x.key, x.value, x.scale)
    start, length = x.shape.rows
    slots = others[:, None, :, None].expand(-1, x.shape.heads, -1, x.shape.head_dim)
    query = x.query[:, :, start : start + length]
    _, lse_without = with_lse(query, x.key.gather(2, slots), x.value.gather(2, slots), x.scale)
    mass = -torch.expm1(lse_without - lse[:, :, start : start + length])  # [B, H, R]
    return out, mass.mean(dim=1, keepdim=True)


def augmented_value(x: Inputs) -> tuple[Tensor, Tensor]:
    """One fused attention with a column of V that marks the selected keys; flash needs Q and K as wide as V."""
    extra = 8  # one column carries the mark, the others keep rows aligned
    value = F.pad(x.value, (0, extra))
    width = x.shape.head_dim
    value[..., width].scatter_(2, x.positions[:, None].expand(-1, x.shape.heads, -1), 1.0)
    query, key = F.pad(x.query, (0, extra)), F.pad(x.key, (0, extra))
    out = F.scaled_dot_product_attention(query, key, value, scale=x.scale)
    start, length = x.shape.rows
    mass = out[:, :, start : start + length, width]
    return out[..., :width], mass.float().mean(dim=1, keepdim=True)


def materialised(x: Inputs) -> tuple[Tensor, Tensor]:
    """The whole probability matrix in the model's dtype, as attention-map tools do."""
    probability = torch.softmax(torch.matmul(x.query, x.key.transpose(-1, -2)) * x.scale, dim=-1)
    start, length = x.shape.rows
    slots = x.positions[:, None, None].expand(-1, x.shape.heads, length, -1)
    mass = probability[:, :, start : start + length].gather(3, slots).float().sum(dim=-1)  # [B, H, R]
    return torch.matmul(probability, x.value), mass.mean(dim=1, keepdim=True)


def with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention and its natural log-sum-exp [B, H, Sq]."""
    results: Any
    if query.device.type == "cpu":
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    elif query.dtype == torch.float32:
        results = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
    else:
        results = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return results[0], results[1][..., : query.shape[2]]


def map_variants(x: Inputs) -> list[Variant]:
    """The variants that return maps, ours first. The materialised one sits out most rounds: it is far slower."""
    variants = [Variant("ours", "ours, with maps", lambda: ours(x))]
    if backend_of(x) == "triton":  # elsewhere it is the same path
        variants.append(Variant("ours_from_lse", "ours, maps from a vendor's LSE", lambda: ours_from_lse(x)))
    others = x.others
    return [
        *variants,
        Variant("lse_difference", "LSE difference (attention twice)", lambda: lse_difference(x, others), 0.25),
        Variant("augmented_value", "augmented V (indicator column)", lambda: augmented_value(x), 0.25),
        Variant("materialised", "materialised softmax", lambda: materialised(x), 1 / 16),
    ]


def bare_variants(x: Inputs) -> list[Variant]:
    """Attention without maps: PyTorch's choice, each vendor kernel of a GPU, and our kernel where it is our own."""

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(x.query, x.key, x.value)

    def vendor(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa()

    variants = [Variant("sdpa", "PyTorch SDPA, no maps", sdpa)]
    if x.query.device.type == "cuda":
        for name, backend in VENDORS.items():
            try:
                vendor(backend)
            except RuntimeError:  # PyTorch has no such kernel for this dtype or device
                continue
            variants.append(Variant(f"sdpa_{name}", f"PyTorch SDPA ({name}), no maps", partial(vendor, backend)))
    if backend_of(x) == "triton":
        variants.append(Variant("ours_without", "ours, no maps", lambda: ours_without_maps(x)))
    return variants


def map_kernel(x: Inputs) -> Variant:
    """Our map kernel by itself: an independent measure of what the maps add behind a vendor's attention."""
    lse = with_lse(x.query, x.key, x.value, x.scale)[1].contiguous()
    run = lambda: attention_maps(x.query, x.key, lse, x.selection, rows=x.shape.rows)  # noqa: E731
    return Variant("map_kernel", "our map kernel alone, LSE given", run)


def definition(x: Inputs) -> Tensor:
    """The maps by the library's definition in float32, one head at a time to bound the memory."""
    heads = []
    for h in range(x.shape.heads):
        query, key, value = (t[:, h : h + 1].float() for t in (x.query, x.key, x.value))
        _, maps, _ = naive.attention(
            query, key, value, x.selection.index, x.selection.weight, None, x.shape.rows, x.scale, True
        )
        heads.append(maps)
    return torch.stack(heads).mean(dim=0)


# Relative RMS error allowed against the definition. float32: 1 - exp(difference) loses about three digits of a mass of
# half a percent. 16 bits: scores or masses rounded to a dtype with 8 bits of mantissa, averaged over heads.
TOLERANCES = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def map_error(maps: Tensor, expected: Tensor) -> float:
    return float((maps.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
