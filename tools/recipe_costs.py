"""The memory and the arithmetic of the recipes for SD3.5-Medium, counted without a GPU: python -m tools.recipe_costs

The transformer is built on PyTorch's meta device, which knows shapes and holds no numbers. The command counts the FLOP
of a forward pass, and the bytes of the tensors that the forward pass of a training step saves for its backward pass,
all in bfloat16 and with the adapters of the preset. Autocast keeps some of them in float32, so a run needs more. No
time is measured here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reporting.tables import markdown_table
from benchmarks.variants import sd3_model
from star_trainer.policy import LORA_TARGETS

GIB = 1024**3
RANK, TEXT = 32, 77 + 128  # of the presets: CLIP's tokens and T5's
PIXELS_PER_LATENT = 8
BATCH = 12


def transformer(side: int, *, checkpointing: bool = False) -> Any:
    """The transformer of SD3.5-Medium with the adapters of the presets, for images of side x side pixels."""
    from peft import LoraConfig

    meta = torch.device("meta")
    size = sd3_model.Size(blocks=24, latent=side // PIXELS_PER_LATENT, text=TEXT, groups=1, group=1, steps=1)
    model = sd3_model.build(size, torch.bfloat16, meta).requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LORA_TARGETS)))
    model.to(torch.bfloat16)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def run(model: Any, side: int, rows: int) -> torch.Tensor:
    """A forward pass of ``rows`` rows: with guidance, two for each sample."""
    latent = side // PIXELS_PER_LATENT
    output: torch.Tensor = model(
        hidden_states=torch.empty(rows, sd3_model.CHANNELS, latent, latent, device="meta", dtype=torch.bfloat16),
        encoder_hidden_states=torch.empty(rows, TEXT, sd3_model.TEXT_WIDTH, device="meta", dtype=torch.bfloat16),
        pooled_projections=torch.empty(rows, sd3_model.POOLED_WIDTH, device="meta", dtype=torch.bfloat16),
        timestep=torch.empty(rows, device="meta"),
        return_dict=False,
    )[0]
    return output


def flop(side: int) -> int:
    """The FLOP of the forward pass of one row, without adapters' gradients."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(transformer(side), side, 1)
    return int(counter.get_total_flops())


def saved(model: Any, side: int, samples: int) -> int:
    """The bytes that a guided forward pass saves for the backward pass, without the model's parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, tuple[Any, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = (storage, storage.nbytes())  # kept, so that no other storage has its address
        return tensor

    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = _flash
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(model, side, 2 * samples)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    return sum(size for _, size in found.values())


class _Flash(torch.autograd.Function):
    """Saves what flash attention saves. The meta device would use the softmax matrix."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Flash.apply(query, key, value)


def main() -> None:
    rows = {}
    for side in (512, 1024):
        plain, checkpointed = transformer(side), transformer(side, checkpointing=True)
        rows[f"{side}²"] = [
            f"{flop(side) / 1e12:.1f}",
            f"{saved(plain, side, 1) / GIB:.1f}",
            f"{saved(plain, side, BATCH) / GIB:.0f}",
            f"{saved(checkpointed, side, BATCH) / GIB:.1f}",
        ]
    adapters = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in plain.parameters()) - adapters
    print(f"transformer: {weights / 1e9:.2f} billion parameters; adapters: {adapters / 1e6:.1f} million\n")
    heads = [
        "TFLOP of a forward pass, one row",
        "GiB of activations, 1 sample",
        f"GiB, {BATCH} samples",
        f"GiB, {BATCH} samples, checkpointing",
    ]
    print(markdown_table("SD3.5-Medium with guidance", heads, rows))


if __name__ == "__main__":
    main()
