"""Each base computes what its pipeline computes, and trains as Flow-GRPO does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import base_pipelines
import diffusers
import pytest
import torch
from doubled import rolled_out
from flow_grpo_update import check_update
from tiers import mostly_exhaustive
from torch import Tensor, nn

from star_kernels.capture import attach_maps
from star_trainer.bases import BASES, base_of
from star_trainer.bases.base import packed, unpacked
from star_trainer.config import Config
from star_trainer.credit import capture, select
from star_trainer.prompts import Prompt
from star_trainer.rollout import sample
from star_trainer.schedule import noise
from star_trainer.trainer import Trainer

# The arguments of the pipeline's own call that mean the same.
CALLS: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 4.5},
    "flux": {"guidance_scale": 3.5},
    "qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
    "z_image": {"guidance_scale": 4.0},
}
PROMPTS = ("a red circle and a blue square", "a small green triangle left of a yellow ring")

per_base = pytest.mark.parametrize("name", list(base_pipelines.PIPELINES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: base_pipelines.save(name, folder) for name in base_pipelines.PIPELINES}


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@pytest.fixture
def configure_base(
    configure: Callable[..., Config], folders: dict[str, Path], prompt_file: str
) -> Callable[..., Config]:
    """As ``configure``, for a base."""

    def make(name: str, **parts: dict[str, Any]) -> Config:
        for section, values in base_pipelines.settings(name, folders[name]).items():
            parts[section] = {**values, **parts.get(section, {})}
        return configure(**{"data": {"prompts": prompt_file}, **parts})

    return make


def _packs(name: str) -> bool:
    return name in ("flux", "qwen_image")


@per_base
def test_samples_are_those_of_the_pipeline(
    configure_base: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Latents and images, with the pipeline's own noise levels, guidance and texts of different lengths."""
    config = configure_base(name, evaluation={"steps": 4})
    trainer = trainer_of(config)
    policy, pipeline = trainer.policy, trainer.policy.pipeline
    drawn: list[Tensor] = []
    decode = policy.decode
    monkeypatch.setattr(policy, "decode", lambda latents: drawn.append(latents) or decode(latents))
    images = sample(policy, [Prompt(text) for text in PROMPTS], ["a", "b"], config, trainer.accelerator.autocast)
    start = noise(policy.latent_shape(), ["a", "b"], policy.device)
    call = {
        "num_inference_steps": 4,
        "height": base_pipelines.SIDE,
        "width": base_pipelines.SIDE,
        "max_sequence_length": base_pipelines.LENGTHS[name],
        "latents": packed(start) if _packs(name) else start,
        **CALLS[name],
    }
    expected = pipeline(list(PROMPTS), output_type="latent", **call).images
    expected = unpacked(expected, start) if _packs(name) else expected
    torch.testing.assert_close(drawn[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(images, pipeline(list(PROMPTS), output_type="pt", **call).images, rtol=1e-5, atol=1e-5)
    assert float((drawn[0][0] - start[0]).abs().max()) > 0.1
    assert policy.schedule(4).sigmas == tuple(pipeline.scheduler.sigmas.tolist())


def _by_hand(name: str, pipeline: Any, texts: list[str], guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided velocity, by the transformer and functions of the pipeline."""
    model, count, empty = pipeline.transformer, len(texts), [""] * len(texts)
    rows = base_pipelines.ROWS

    def twice(predict: Callable[[list[str]], Tensor]) -> Tensor:
        without, with_text = predict(empty), predict(texts)
        return without + guidance * (with_text - without)

    def sd3(x: Tensor, sigma: Tensor) -> Tensor:
        def predict(prompts: list[str]) -> Tensor:
            tokens, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=base_pipelines.LENGTHS[name]
            )
            return model(x, tokens.double(), pooled.double(), sigma.mul(1000).expand(count), return_dict=False)[0]

        return twice(predict)

    def flux(x: Tensor, sigma: Tensor) -> Tensor:
        tokens, pooled, txt_ids = pipeline.encode_prompt(texts, None, max_sequence_length=base_pipelines.LENGTHS[name])
        found = model(
            pipeline._pack_latents(x, count, 4, 2 * rows, 2 * rows),
            encoder_hidden_states=tokens.double(),
            pooled_projections=pooled.double(),
            timestep=sigma.expand(count),
            guidance=torch.full((count,), guidance),
            img_ids=pipeline._prepare_latent_image_ids(count, rows, rows, x.device, x.dtype),
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(found, base_pipelines.SIDE, base_pipelines.SIDE, pipeline.vae_scale_factor)

    def qwen_image(x: Tensor, sigma: Tensor) -> Tensor:
        def predict(prompts: list[str]) -> Tensor:
            tokens, mask = pipeline.encode_prompt(prompts, max_sequence_length=base_pipelines.LENGTHS[name])
            return model(
                pipeline._pack_latents(x, count, 4, 2 * rows, 2 * rows),
                encoder_hidden_states=tokens.double(),
                encoder_hidden_states_mask=mask,
                timestep=sigma.expand(count),
                img_shapes=[[(1, rows, rows)]] * count,
                return_dict=False,
            )[0]

        found = twice(predict)
        found = found * predict(texts).norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)
        side = base_pipelines.SIDE
        return pipeline._unpack_latents(found, side, side, pipeline.vae_scale_factor)[:, :, 0]

    def z_image(x: Tensor, sigma: Tensor) -> Tensor:
        def predict(prompts: list[str]) -> Tensor:
            rows, _ = pipeline.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=base_pipelines.LENGTHS[name]
            )
            images, time = [image[:, None] for image in x], (1000 - 1000 * sigma.float()) / 1000
            found = model(images, time.expand(count), [row.double() for row in rows], return_dict=False)[0]
            return -torch.stack(found).squeeze(2)

        return twice(predict)

    return {"sd3": sd3, "flux": flux, "qwen_image": qwen_image, "z_image": z_image}[name]


@per_base
def test_the_update_is_flow_grpos(
    configure_base: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    config = configure_base(
        name,
        rollout={"steps": 4, "groups": 2, "group_size": 3, "batch": 6},
        allocation={"method": "plain"},
        train={"clip_range": 1e-4, "kl_coef": 0.04, "batch": 6},
    )
    trainer = trainer_of(config)
    texts = [trainer.prompts[n // 3].text for n in range(config.samples)]
    velocity_of = _by_hand(name, trainer.policy.pipeline, texts, config.rollout.guidance)
    check_update(trainer, config, velocity_of, monkeypatch)


@per_base
def test_weights_have_the_grid_of_the_tokens(
    configure_base: Callable[..., Config], trainer_of: Callable[[Config], Trainer], name: str
) -> None:
    """Also those of prompts of different lengths, whose words are at different positions; each has its own map."""
    config = configure_base(name, rollout={"groups": 2, "group_size": 2})
    trainer = trainer_of(config)
    for step in rolled_out(trainer, config).steps:
        weights = step.weights
        assert weights is not None
        assert weights.shape == (4, base_pipelines.ROWS, base_pipelines.ROWS)
        torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(4), rtol=0, atol=1e-5)
        assert float(weights.std(dim=(1, 2)).min()) > 1e-3


@per_base
def test_maps_are_those_of_the_prompt_and_not_of_the_empty_one(
    configure_base: Callable[..., Config], trainer_of: Callable[[Config], Trainer], name: str
) -> None:
    config = configure_base(name)
    trainer = trainer_of(config)
    policy, prompts = trainer.policy, trainer.prompts
    selection, text = select(policy, prompts, config.allocation), policy.encode([prompt.text for prompt in prompts])
    latents = noise(policy.latent_shape(), ["a", "b"], policy.device)
    with torch.no_grad():
        with capture(policy, selection, config) as guided:
            policy.velocity(latents, 500.0, text)
        with attach_maps(policy.transformer, selection, cfg=None) as alone:
            policy.base.predict(policy.transformer, latents, torch.tensor([500.0, 500.0]), text)
    assert guided.value.shape == (2, 1, base_pipelines.ROWS, base_pipelines.ROWS)
    torch.testing.assert_close(guided.value, alone.value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "lora_rank"),
    mostly_exhaustive(
        product(base_pipelines.PIPELINES, (0, 4)), [("qwen_image", 0), ("qwen_image", 4), ("flux", 4), ("z_image", 0)]
    ),
)
def test_every_trained_weight_has_a_gradient(
    configure_base: Callable[..., Config], trainer_of: Callable[[Config], Trainer], name: str, lora_rank: int
) -> None:
    """Distributed training waits for the gradient of each, and an exported adapter without one has no effect."""
    config = configure_base(name, model={"lora_rank": lora_rank, "gradient_checkpointing": True}, rollout={"steps": 2})
    trainer = trainer_of(config)
    with torch.no_grad():  # half of the adapters' weights are initialised to zero
        for parameter in trainer.average.parameters.values():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    trainer.updater.gradients([rolled_out(trainer, config)], torch.tensor([1.0, -1.0, 0.5, -0.5]))
    without = [n for n, p in trainer.average.parameters.items() if p.grad is None]
    assert not without


def test_the_last_text_output_of_qwen_image_is_not_trained(
    configure_base: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    policy = trainer_of(configure_base("qwen_image")).policy
    adapted = {n.rpartition(".lora_")[0] for n, p in policy.model.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * 12 - 4  # two blocks of twelve layers; the norm of the queries has no adapter
    assert not adapted & set(policy.base.without_effect())


@pytest.mark.parametrize("name", mostly_exhaustive(base_pipelines.PIPELINES, ["flux", "z_image"]))
def test_strength_0_is_plain_and_a_resumed_run_is_the_same_run(
    configure_base: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path, name: str
) -> None:
    """Bit for bit."""
    written = {}
    for run, method, epochs in (("plain", "plain", [2]), ("star", "star", [1, 2])):
        for count in epochs:
            config = configure_base(
                name,
                allocation={"method": method, "strength": 0.0},
                train={"epochs": count, "kl_coef": 0.01},
                output={"folder": str(tmp_path / run), "resume": count > epochs[0]},
            )
            trainer_of(config).run()
        written[run] = [
            (tmp_path / run / "checkpoint-000002" / f"{part}.safetensors").read_bytes()
            for part in ("weights", "optimizer", "average")
        ]
    assert written["plain"] == written["star"]


@per_base
def test_exported_adapters_work_in_the_pipeline(
    configure_base: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    folders: dict[str, Path],
    name: str,
) -> None:
    config = configure_base(name, train={"ema": 0.0})
    trainer = trainer_of(config)
    with torch.no_grad():
        for parameter in trainer.average.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    trainer.policy.export(trainer.folder / "final", write=True)
    pipeline = getattr(diffusers, type(trainer.policy.pipeline).__name__).from_pretrained(
        folders[name], **({"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {})
    )
    latents = noise(trainer.policy.latent_shape(), ["a", "b"], torch.device("cpu"))
    text = trainer.policy.encode(PROMPTS)
    timestep = torch.tensor([500.0, 500.0])
    predict = trainer.policy.base.predict
    with torch.no_grad():
        before = predict(pipeline.transformer, latents, timestep, text)
        pipeline.load_lora_weights(trainer.folder / "final")
        after = predict(pipeline.transformer, latents, timestep, text)
        expected = predict(trainer.policy.model, latents, timestep, text)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert float((after - before).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_kept_embeddings_do_not_depend_on_other_prompts(
    configure_base: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    policy = trainer_of(configure_base(name, model={"kept_texts": 2})).policy
    plain = trainer_of(configure_base(name)).policy.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    encoded: list[str] = []
    encode = policy.base.encode
    monkeypatch.setattr(
        policy.base, "encode", lambda prompts, device: encoded.extend(prompts) or encode(prompts, device)
    )
    alone = policy.encode([PROMPTS[0]])
    both = policy.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    torch.testing.assert_close(both.tokens, plain.tokens, rtol=1e-5, atol=1e-5)
    assert torch.equal(both[1:2].unpadded()[0], alone.unpadded()[0])
    assert encoded == [*PROMPTS]
    policy.encode(["a third"])
    policy.encode([PROMPTS[1]])
    assert encoded == [*PROMPTS, "a third", PROMPTS[1]]  # the second was used before the first, and was discarded


def test_offloaded_models_are_on_the_device_only_while_they_run(
    configure_base: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(configure_base("flux"))
    policy = trainer.policy
    monkeypatch.setattr(policy, "_offloaded", True)
    monkeypatch.setattr(policy, "device", torch.device("cpu", 0))
    moved: list[tuple[str, str]] = []
    for part, model in policy.pipeline.components.items():
        if isinstance(model, nn.Module):
            monkeypatch.setattr(
                model, "to", lambda device, part=part: moved.append((part, "in" if device == policy.device else "out"))
            )
    policy.encode(PROMPTS)
    assert moved == [(part, way) for way in ("in", "out") for part in ("text_encoder", "text_encoder_2")]
    moved.clear()
    policy.decode(torch.zeros(1, *policy.latent_shape()))
    assert moved == [("vae", "in"), ("vae", "out")]


def test_offloading_on_a_cpu_is_an_error(
    configure_base: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    with pytest.raises(ValueError, match=r"model\.offload must be false on a CPU"):
        trainer_of(configure_base("flux", model={"offload": True}))


def _stub(name: str, scheduler: str = "FlowMatchEulerDiscreteScheduler", **config: Any) -> Any:
    transformer = SimpleNamespace(config=SimpleNamespace(**config))
    return type(name, (), {"transformer": transformer, "scheduler": type(scheduler, (), {})()})()


@pytest.mark.parametrize(
    ("pipeline", "settings", "message"),
    [
        (_stub("SanaPipeline"), {}, "model.path must be one of StableDiffusion3Pipeline, FluxPipeline, QwenImage"),
        (_stub("QwenImagePipeline", "UniPCMultistepScheduler"), {}, "scheduler is a FlowMatchEuler.*got a UniPC"),
        (_stub("QwenImagePipeline"), {"text_length": 1025}, r"model\.text_length must be at most 1024 for QwenImageP"),
        (
            _stub("FluxPipeline", guidance_embeds=True),
            {"text_length": 513},
            "text_length must be at most 512 for Flux",
        ),
        (
            _stub("FluxPipeline", guidance_embeds=False),
            {"guidance": 3.5},
            "guidance must be 1 for a FluxPipe",
        ),
    ],
)
def test_what_a_base_cannot_follow_is_an_error(pipeline: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        base_of(pipeline, **{"text_length": 128, "guidance": 1.0, **settings})


def test_a_class_that_derives_from_a_known_pipeline_has_its_base() -> None:
    derived = type("Mine", (type(_stub("ZImagePipeline")),), {})
    derived.__mro__[1].__name__ = "ZImagePipeline"
    pipeline = derived()
    pipeline.scheduler = type("FlowMatchEulerDiscreteScheduler", (), {})()
    assert type(base_of(pipeline, text_length=128, guidance=1.0)).__name__ == "ZImage"


@pytest.mark.parametrize("name", BASES)
def test_the_registry_names_pipelines_of_diffusers(name: str) -> None:
    assert hasattr(diffusers, name)
