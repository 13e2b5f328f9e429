"""Runs every kernel once at a small size and compares it with the reference: python -m tools.gpu_smoke

Each group of kernels runs in a process of its own, all at the same time, so that kernels compile in parallel and an
error on the device, after which a process cannot use it, ends only one group. A line is printed for each kernel. The
reference is the implementation in plain PyTorch, in float64 on the same device. On a CPU the CPU kernels are checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_kernels import (
    TokenSelection,
    attention,
    attention_maps,
    flow_sde,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)
from star_kernels.attention import dispatch, vendor
from star_kernels.policy import backends

ROOT = Path(__file__).resolve().parents[1]
# Relative RMS error allowed against float64.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MODEL_TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 1e-1}  # convolutions may use TF32
Results = dict[str, Tensor]
Check = tuple[str, str | None, float, Callable[[], tuple[Results, Results]]]  # name, obstacle, tolerance, run

ONE_PHRASE = TokenSelection.from_positions([[1, 44], [0, 7, 9]])
FOUR_PHRASES = TokenSelection.from_positions([[[1, 44], [3], [5, 6], []], [[], [0, 7, 9], [2], [40]]])


def attention_checks(device: str, kernels: Sequence[str], backward: bool) -> Iterator[Check]:
    """Attention with maps of one and of four phrases: the results, or their gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for kernel in kernels:
        for selection, masked in ((ONE_PHRASE, False), (FOUR_PHRASES, kernel in ("triton", "vendor", "hopper"))):
            for maps in (False, True) if backward else (True,):
                name = f"attention {'backward' if backward else 'forward'}, {kernel}, {phrases(selection)}"
                name += ", key mask" * masked + ", gradient of the maps" * (backward and maps)
                obstacle = dispatch.obstacle(kernel, device, dtype, 64, masked)
                run = partial(run_attention, device, dtype, kernel, selection, masked, backward, maps)
                yield name, obstacle, TOLERANCES[dtype], run


def run_attention(
    device: str, dtype: torch.dtype, kernel: str, selection: TokenSelection, masked: bool, backward: bool, maps: bool
) -> tuple[Results, Results]:
    tensors = [normal(device, 2, 3, n, 64, dtype=dtype) for n in (200, 141, 141)]
    mask = torch.ones(2, 141, dtype=torch.bool)
    mask[0, 100:] = False
    found = []
    for backend, kind in ((kernel, dtype), ("naive", torch.float64)):
        leaves = [t.to(kind).requires_grad_(backward) for t in tensors]
        result = attention(
            *leaves, selection.to(device), rows=(3, 150), key_mask=mask.to(device) if masked else None,
            return_lse=True, backend=backend,
        )  # fmt: skip
        if backward:
            # The factor gives the gradients of the maps and of the output about the same size.
            loss = result.out.double().square().sum() + 1e4 * maps * result.maps.double().square().sum()
            found.append(dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves), strict=True)))
        else:
            found.append({"out": result.out, "maps": result.maps, "lse": result.lse})
    return found[0], found[1]


def maps_checks(device: str) -> Iterator[Check]:
    """Maps from a log-sum-exp, in both directions."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for direction in ("image_to_text", "text_to_image"):
        for selection in (ONE_PHRASE, FOUR_PHRASES):
            name = f"maps {direction.replace('_', ' ')}, {phrases(selection)}"
            yield name, None, TOLERANCES[dtype], partial(run_maps, device, dtype, direction, selection)


def run_maps(device: str, dtype: torch.dtype, direction: str, selection: TokenSelection) -> tuple[Results, Results]:
    query, key = normal(device, 2, 3, 200, 64, dtype=dtype), normal(device, 2, 3, 141, 64, dtype=dtype)
    lse = torch.logsumexp(query.double() @ key.double().mT / 8, dim=-1)
    found = []
    for backend, kind, wide in (("auto", dtype, torch.float32), ("naive", torch.float64, torch.float64)):
        maps = attention_maps(
            query.to(kind), key.to(kind), lse.to(wide), selection.to(device), direction=direction,
            backend=backend,
        )  # fmt: skip
        found.append({"maps": maps})
    return found[0], found[1]


LAYOUTS = {"image": ((3, 16, 24, 20), 1), "packed": ((3, 130, 64), -1)}
# "weights" is the number of phrases, or 0 for weights without phrases.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "one ratio per sample": {},
    "weights, mask, KL and Guard": {"weights": 0, "mask": True, "kl": True, "guard": True},
    "one ratio per location": {"weights": 0, "ratio": "location"},
    "4 phrases": {"weights": 4},
    "4 phrases, one ratio per location": {"weights": 4, "ratio": "location"},
    "dense advantages": {"dense": True},
    "dense advantages, one ratio per location": {"dense": True, "ratio": "location"},
}


def policy_checks(device: str, backend: str) -> Iterator[Check]:
    """The policy losses and their gradients."""
    for layout in LAYOUTS:
        for objective in OBJECTIVES if layout == "image" else ("weights, mask, KL and Guard",):
            yield policy_check(f"policy loss, {backend}, {layout}, {objective}", device, backend, run_policy, layout,
                               OBJECTIVES[objective])  # fmt: skip


def other_policy_checks(device: str, backend: str) -> Iterator[Check]:
    """The NFT loss with its gradient, and the sampling step."""
    for layout in LAYOUTS:
        yield policy_check(f"sampling step, {backend}, {layout}", device, backend, run_sampling, layout)
        yield policy_check(f"NFT loss, {backend}, {layout}", device, backend, run_nft, layout, False)
    yield policy_check(f"NFT loss, {backend}, weights, mask and KL", device, backend, run_nft, "image", True)


def policy_check(name: str, device: str, backend: str, run: Callable[..., Any], *arguments: Any) -> Check:
    obstacle = backends.obstacle(backend, device, torch.float32)
    return name, obstacle, TOLERANCES[torch.float32], partial(run, device, backend, *arguments)


class Rollout:
    """The tensors of a step of a rollout."""

    def __init__(self, device: str, layout: str, kind: torch.dtype) -> None:
        torch.manual_seed(0)
        shape, self.channel_dim = LAYOUTS[layout]
        self.old, self.sample, self.noise, self.ref, drift = (normal(device, *shape).to(kind) for _ in range(5))
        self.output = (self.old + 0.01 * drift).requires_grad_()
        self.locations = [n for d, n in enumerate(shape) if d not in (0, self.channel_dim % len(shape))]
        self.numbers = (0.2 + torch.rand(shape[0], generator=seeded(1))).to(device, kind)
        self.transition = flow_sde(0.8, 0.7, sigma_max=0.9).to(device)
        self.device, self.kind, self.batch = device, kind, shape[0]

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(self.batch, *size, generator=seeded(2)).to(self.device, self.kind)

    def mask(self) -> Tensor:
        return self.uniform(*self.locations) < 0.7

    def drawn(self, backend: str) -> tuple[Tensor, Tensor]:
        return sample_transition(
            self.old, self.sample, self.transition, noise=self.noise, channel_dim=self.channel_dim, backend=backend
        )

    def results(self, loss: Tensor) -> Results:
        return {"loss": loss, "gradient": torch.autograd.grad(loss, self.output)[0]}


def in_both(backend: str, run: Callable[[str, torch.dtype], Results]) -> tuple[Results, Results]:
    """The results of a backend in float32, and of the reference in float64."""
    return run(backend, torch.float32), run("naive", torch.float64)


def run_sampling(device: str, backend: str, layout: str) -> tuple[Results, Results]:
    def run(name: str, kind: torch.dtype) -> Results:
        return dict(zip(("prev_sample", "log_prob"), Rollout(device, layout, kind).drawn(name), strict=True))

    return in_both(backend, run)


def run_policy(device: str, backend: str, layout: str, objective: dict[str, Any]) -> tuple[Results, Results]:
    prev_sample, log_prob = Rollout(device, layout, torch.float64).drawn("naive")

    def run(name: str, kind: torch.dtype) -> Results:
        x = Rollout(device, layout, kind)
        count = objective.get("weights")
        advantages, weights = x.numbers, None
        if objective.get("dense"):
            advantages = x.uniform(*x.locations) - 0.5
        if count is not None:
            weights = x.uniform(*[count] * (count > 0), *x.locations)
        if count:
            advantages = x.uniform(count) - 0.5
        loss = weighted_policy_loss(
            x.output, x.sample, prev_sample.to(kind), log_prob.to(kind), advantages, x.transition,
            weights=weights, ratio=objective.get("ratio", "sample"), clip_range=0.5,
            mask=x.mask() if objective.get("mask") else None,
            ref_model_output=x.ref if objective.get("kl") else None, kl_coef=0.1 * objective.get("kl", False),
            old_model_output=x.old if objective.get("guard") else None,
            channel_dim=x.channel_dim, backend=name,
        ).loss  # fmt: skip
        return x.results(loss)

    return in_both(backend, run)


def run_nft(device: str, backend: str, layout: str, everything: bool) -> tuple[Results, Results]:
    def run(name: str, kind: torch.dtype) -> Results:
        x = Rollout(device, layout, kind)
        options: dict[str, Any] = {}
        if everything:
            options = {"weights": x.uniform(*x.locations), "mask": x.mask(), "ref_model_output": x.ref, "kl_coef": 0.1}
        loss = weighted_nft_loss(
            x.output, x.old, x.noise, x.numbers, x.numbers, channel_dim=x.channel_dim, backend=name, **options
        ).loss
        return x.results(loss)

    return in_both(backend, run)


def capture_checks(device: str) -> Iterator[Check]:
    """The output and the maps of a tiny transformer of SD3.5 with a capture."""
    obstacle = None if importlib.util.find_spec("diffusers") else "the package diffusers is not installed"
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        name = f"capture of a tiny SD3.5 transformer, {str(dtype).removeprefix('torch.')}"
        yield name, obstacle, MODEL_TOLERANCES[dtype], partial(run_capture, device, dtype)


def run_capture(device: str, dtype: torch.dtype) -> tuple[Results, Results]:
    import diffusers
    from diffusers.utils.logging import set_verbosity_error

    from star_kernels.capture import capture_maps

    set_verbosity_error()  # no warning about casting a model that was not loaded from a file
    model: Any = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=16,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    selection = TokenSelection.from_positions([[1, 5], [2]]).to(device)
    inputs = {
        "hidden_states": normal(device, 2, 4, 16, 16, dtype=dtype),
        "encoder_hidden_states": normal(device, 2, 20, 32, dtype=dtype),
        "pooled_projections": normal(device, 2, 16, dtype=dtype),
        "timestep": torch.full((2,), 500.0, device=device),
    }
    found = []
    for kind in (dtype, torch.float64):
        model.to(device, kind).requires_grad_(False)
        inputs = {name: tensor.to(kind) for name, tensor in inputs.items()}
        with capture_maps(model, selection, blocks="all", cfg=None) as maps:
            output = model(**inputs, return_dict=False)[0]
        found.append({"output": output, "maps": maps.value})
    return found[0], found[1]


def groups(device: str) -> dict[str, Callable[[], Iterator[Check]]]:
    """The checks of each process."""
    kernels: dict[str, Sequence[str]] = {"triton": ["triton"], "hopper": ["hopper"], "vendor": vendor.KERNELS}
    if device == "cpu":
        kernels = {"vendor": ["vendor"]}
    found: dict[str, Callable[[], Iterator[Check]]] = {}
    for name, chosen in kernels.items():
        found[f"attention-{name}"] = partial(attention_checks, device, chosen, False)
        found[f"backward-{name}"] = partial(attention_checks, device, chosen, True)
    found["maps"] = partial(maps_checks, device)
    for backend in ("native", "triton") if device == "cuda" else ("native",):
        found[f"policy-{backend}"] = partial(policy_checks, device, backend)
        found[f"nft-{backend}"] = partial(other_policy_checks, device, backend)
    return {**found, "capture": partial(capture_checks, device)}


def run_group(checks: Iterator[Check], device: str) -> int:
    """Runs the checks, prints a line for each, and returns the number of failures."""
    failures = 0
    for name, obstacle, tolerance, run in checks:
        started = time.perf_counter()
        verdict, detail = "skipped", obstacle or ""
        if obstacle is None:
            try:
                torch.manual_seed(0)
                detail = worst(*run(), tolerance)
                if device == "cuda":
                    torch.cuda.synchronize()
                verdict = "FAILED" if detail else "ok"
            except Exception as problem:
                verdict, detail = "FAILED", f"{type(problem).__name__}: {problem}".splitlines()[0]
        failures += verdict == "FAILED"
        print(f"{verdict:<8}{time.perf_counter() - started:5.1f} s  {name}{detail and ': ' + detail}", flush=True)
    return failures


def worst(got: Results, want: Results, tolerance: float) -> str:
    """What differs from the reference; empty if everything agrees."""
    for name, expected in want.items():
        difference = (got[name].detach().double() - expected.detach().double()).norm()
        error = float(difference / expected.detach().double().norm().clamp(min=1e-6))
        if not error <= tolerance:
            return f"{name} has a relative error of {error:.1e}, allowed {tolerance:.0e}"
    return ""


def run_apart(names: Sequence[str], device: str, seconds: float) -> int:
    """Runs each group in a process of its own. Prints a summary and returns the exit status."""
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", "tools.gpu_smoke", "--device", device]

    def failure(name: str) -> str:
        try:
            limit = max(0.1, end - time.monotonic())
            status = subprocess.run([*command, "--only", name], cwd=ROOT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"{name} (not finished after {seconds:.0f} s)"
        return f"{name} (exit status {status})" if status else ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = list(filter(None, pool.map(failure, names)))
    print(f"FAILED: {', '.join(failed)}" if failed else f"all {len(names)} groups of kernels agree with the reference")
    return int(bool(failed))


def normal(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def phrases(selection: TokenSelection) -> str:
    count = selection.weight.shape[1]
    return f"{count} phrase{'s' * (count > 1)}"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: cuda if there is a GPU")
    parser.add_argument("--only", help="run only this group, in this process")
    parser.add_argument("--seconds", type=float, default=50.0, help="time limit of all groups (default: 50)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} cannot use a GPU on this machine")
    found = groups(options.device)
    if options.only is None:
        return run_apart(list(found), options.device, options.seconds)
    if options.only not in found:
        parser.error(f"--only must be one of {', '.join(found)}; got {options.only!r}")
    return int(run_group(found[options.only](), options.device) > 0)


if __name__ == "__main__":
    sys.exit(main())
