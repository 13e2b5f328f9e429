"""Captures beside every attention backend of diffusers that runs here: python -m tools.check_backends

For each backend, a captured call must have the output of a call without a capture, bit for bit, and the maps of the
softmax in float32. A line is printed for each, with the way the maps are made. The hub's kernels are downloaded if the
`kernels` package is installed and the hub can be reached.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from star_kernels import TokenSelection
from star_kernels.capture import attention_call, capture_maps
from star_kernels.capture.backends import BACKENDS, Backend

TEXT, ROWS, COLUMNS = 77, 32, 32
EXACT, QUANTISED = 1e-3, 1e-1  # RMS error allowed, relative to the RMS of the maps


class Attention(nn.Module):
    """Given queries, keys and values, in a module as a capture expects it."""

    def __init__(self, name: str, qkv: list[Tensor], mask: Tensor | None) -> None:
        super().__init__()
        self.qkv, self.mask = qkv, mask
        self.processor = Processor(name)

    def forward(self) -> Any:
        return self.processor(self)


class Processor:
    _parallel_config = None

    def __init__(self, name: str) -> None:
        self._attention_backend = name

    def __call__(self, module: Attention) -> Any:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(*module.qkv, attn_mask=module.mask, backend=self._attention_backend)


class Model(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self) -> Any:
        return self.attention()


def check(row: Backend, device: str, dtype: torch.dtype, masked: bool) -> tuple[bool, str]:
    """Whether the capture is right, and words for it."""
    torch.manual_seed(0)
    length = TEXT + ROWS * COLUMNS
    qkv = [torch.randn(2, length, 4, 64).to(device, dtype) for _ in range(3)]
    valid = torch.arange(length) < torch.tensor([[length], [length - 100]])
    # A mask [B, 1, 1, Sk] has the same meaning for all backends that have masks of keys.
    mask = (torch.where(valid, 0.0, -torch.inf) if row.mask == "xformers" else valid)[:, None, None]
    mask = mask.to(device, dtype if row.mask == "xformers" else None)
    model = Model(Attention(row.name, qkv, mask if masked else None))
    selection = TokenSelection.from_positions([[3, 4], [10]]).to(device)
    expected = model()
    options: dict[str, Any] = {"rows": (TEXT, ROWS * COLUMNS), "grid": (ROWS, COLUMNS), "cfg": None}
    attention_call._warned.clear()  # so that a second pass is announced again
    with warnings.catch_warnings(record=True) as found, capture_maps(model, selection, **options) as maps:
        warnings.simplefilter("always")
        out = model()
    way = "a second pass" if any("computed twice" in str(w.message) for w in found) else "its log-sum-exp"
    error = relative_error(maps.value.flatten(2), reference(qkv, valid.to(device) if masked else None, selection))
    same = torch.equal(out, expected)
    good = same and error <= (EXACT if row.exact or way != "its log-sum-exp" else QUANTISED)
    return good, f"{'same' if same else 'ANOTHER'} output, maps from {way}, relative error {error:.1e}"


@torch.no_grad()
def reference(qkv: list[Tensor], valid: Tensor | None, selection: TokenSelection) -> Tensor:
    query, key = (t.transpose(1, 2).float() for t in qkv[:2])
    scores = query[:, :, TEXT:] @ key.mT * query.shape[-1] ** -0.5
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    attention = scores.softmax(dim=-1).mean(dim=1)
    found = [attention[b][:, index[index >= 0].long()].sum(dim=-1) for b, index in enumerate(selection.index)]
    return torch.stack(found)[:, None]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def available(name: str) -> str:
    """Why the backend cannot be used here; empty if it can."""
    from diffusers.models import attention_dispatch as dispatch

    try:
        member = dispatch.AttentionBackendName(name)
        dispatch._check_attention_backend_requirements(member)
        dispatch._maybe_download_kernel_for_backend(member)
    except Exception as error:  # packages and the hub raise whatever they like
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_backends", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: cuda if there is a GPU")
    device = parser.parse_args(arguments).device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    failed, run = [], 0
    for row in BACKENDS.values():
        for masked in (False, True) if row.mask in ("sdpa", "keys", "count", "flex", "xformers") else (False,):
            name = row.name + ", masked" * masked
            problem = available(row.name)
            if not problem:
                try:
                    good, words = check(row, device, dtype, masked)
                except ValueError as error:  # an error of the capture, among others
                    good, words = False, str(error)
                except Exception as error:  # the kernel does not run here
                    problem = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            if problem:
                print(f"{name}: not run here ({problem})", flush=True)
                continue
            run += 1
            failed += [] if good else [name]
            print(f"{name}: {'ok' if good else 'FAILED'}, {words}", flush=True)
    print(f"FAILED: {', '.join(failed)}" if failed else f"captures are right beside all {run} backends that run here")
    return int(bool(failed) or not run)


if __name__ == "__main__":
    sys.exit(main())
