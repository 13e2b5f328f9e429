"""Runs every GPU kernel at small, odd sizes and compares it with the reference: python tests/small_calls.py

The script is run under compute-sanitizer, which makes kernels several hundred times slower. Set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor has its own allocation and accesses past its end are detected.
"""

from __future__ import annotations

import itertools
import sys

import torch

from star_kernels import (
    TokenSelection,
    attention,
    attention_maps,
    flow_cps,
    flow_sde,
    native,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)
from star_kernels.attention.dispatch import obstacle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Few Triton cases, because their compilation takes most of the time.
ATTENTION_CASES = [
    (torch.bfloat16, 64, False),
    (torch.bfloat16, 40, True),
    (torch.float16, 128, True),
    (torch.float32, 64, False),
]
HOPPER_CASES = [(torch.bfloat16, 64, True), (torch.float16, 128, False)]
TRITON_POLICY_CASES = [(torch.float32, (2, 5, 9, 7)), (torch.bfloat16, (2, 64, 64))]
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def close(name: str, got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-3))
    if not error <= TOLERANCES[dtype]:
        sys.exit(f"{name}, {dtype}: relative error {error:.2e}, allowed {TOLERANCES[dtype]:.0e}")


def check_attention(dtype: torch.dtype, width: int, masked: bool, chosen: str = "triton") -> None:
    batch, heads, queries, keys = 2, 3, 70, 45
    tensors = [torch.randn(batch, heads, n, width, device="cuda", dtype=dtype) for n in (queries, keys, keys)]
    selection = TokenSelection.from_positions([[[1, 44], [3]], [[], [0, 7, 9]]]).to("cuda")
    mask = torch.rand(batch, keys, device="cuda") < 0.8 if masked else None
    options = {"rows": (3, 60), "key_mask": mask, "return_lse": True}
    results = []
    for backend, kind in ((chosen, dtype), ("naive", torch.float64)):
        leaves = [t.to(kind).detach().requires_grad_() for t in tensors]
        out, maps, lse = attention(*leaves, selection, backend=backend, **options)
        loss = out.double().square().sum() + maps.double().square().sum() + lse.double().sum()
        results.append((out, maps, lse, *torch.autograd.grad(loss, leaves)))
    for name, got, expected in zip(("out", "maps", "lse", "dq", "dk", "dv"), *results, strict=True):
        close(f"attention {name}, head dim {width}", got, expected, dtype)
    lse = results[0][2].detach()
    for direction in ("image_to_text", "text_to_image"):
        both = [attention_maps(*tensors[:2], lse, selection, direction=direction, key_mask=mask, backend=b)
                for b in ("auto", "naive")]  # fmt: skip
        close(f"maps {direction}", *both, dtype)


def check_policy(backend: str, dtype: torch.dtype, shape: tuple[int, ...], channel_dim: int) -> None:
    latents = [torch.randn(shape, device="cuda") for _ in range(5)]
    output, sample, noise, old, ref_output = latents
    batch = shape[0]
    locations = [n for d, n in enumerate(shape) if d not in (0, channel_dim % len(shape))]
    transition = flow_sde(0.8, 0.7, sigma_max=0.9).to("cuda")
    prev, log_prob = sample_transition(
        old.to(dtype), sample, transition, noise=noise, channel_dim=channel_dim, backend=backend
    )
    output = (old + 0.01 * output).to(dtype)
    mask = torch.rand(batch, *locations, device="cuda") < 0.7
    mask.view(batch, -1)[:, 0] = True
    weights, numbers = torch.rand(batch, *locations, device="cuda"), torch.rand(batch, device="cuda") + 0.1
    common = {"weights": weights, "mask": mask, "step_weights": numbers, "ref_model_output": ref_output,
              "kl_coef": 0.1, "channel_dim": channel_dim}  # fmt: skip
    for ratio in ("sample", "location"):
        found = []
        for name in (backend, "naive"):
            leaf = output.detach().requires_grad_()
            loss = weighted_policy_loss(
                leaf, sample, prev, log_prob, numbers, transition, ratio=ratio, clip_range=0.5,
                old_model_output=old.to(dtype), backend=name, **common,
            ).loss  # fmt: skip
            found.append((loss, torch.autograd.grad(loss, leaf)[0]))
        for part, got, expected in zip(("loss", "gradient"), *found, strict=True):
            close(f"policy {part}, {backend}, {ratio}", got, expected, dtype)
    found = []
    for name in (backend, "naive"):
        leaf = output.detach().requires_grad_()
        loss = weighted_nft_loss(leaf, old, noise, numbers, numbers, backend=name, **common).loss
        found.append((loss, torch.autograd.grad(loss, leaf)[0]))
    for part, got, expected in zip(("loss", "gradient"), *found, strict=True):
        close(f"nft {part}, {backend}", got, expected, dtype)


def main() -> None:
    torch.manual_seed(0)
    for dtype, width, masked in ATTENTION_CASES:
        check_attention(dtype, width, masked)
    kernels = ["triton"]
    for dtype, width, masked in HOPPER_CASES:
        if obstacle("hopper", "cuda", dtype, width) is None:
            check_attention(dtype, width, masked, "hopper")
            kernels.append(f"hopper {width}")
    backends = ["triton"] + ([] if native.problem("cuda") else ["native"])
    shapes = [((2, 5, 9, 7), 1), ((3, 8, 16, 16), 1), ((2, 37, 20), -1), ((2, 64, 64), -1), ((1, 3, 2, 4, 6), 1)]
    for backend, dtype, (shape, channel_dim) in itertools.product(backends, DTYPES, shapes):
        if backend == "native" or (dtype, shape) in TRITON_POLICY_CASES:
            check_policy(backend, dtype, shape, channel_dim)
    sigma = torch.tensor([1.0, 0.7, 0.2], device="cuda")
    for make in (lambda s: flow_sde(s, 0.1, sigma_max=s[1]), lambda s: flow_cps(s, 0.5 * s)):
        close("transition", make(sigma).coefficients, make(sigma.cpu()).coefficients, torch.float32)
    torch.cuda.synchronize()
    print(
        f"all kernels agree with the reference: attention ({', '.join(kernels)}), policy losses ({', '.join(backends)})"
    )


if __name__ == "__main__":
    main()
