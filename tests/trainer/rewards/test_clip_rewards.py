"""PickScore, CLIPScore and the aesthetic predictor with a tiny random CLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from star_trainer.rewards import Reward, build
from star_trainer.rewards.aesthetic import Aesthetic, linear_chain
from star_trainer.rewards.clip import Clip
from star_trainer.rewards.clipscore import ClipScore
from star_trainer.rewards.images import to_pil
from star_trainer.rewards.pickscore import PickScore

pytest.importorskip("PIL")
PROMPTS = ["a cat", "a dog on a bench", "", "a photo of nine clocks"]


@pytest.fixture
def logits(tiny_clip: Path, images: Tensor) -> Tensor:
    """CLIP's logits of each image and its prompt, ``[4]``."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(tiny_clip)
    inputs = processor(text=PROMPTS, images=to_pil(images, "test"), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal()


def test_pickscore_is_clips_logit_over_26(tiny_clip: Path, images: Tensor, logits: Tensor) -> None:
    scores = PickScore(model=tiny_clip, processor=tiny_clip)(images, PROMPTS, [{}] * 4)
    assert torch.allclose(scores, logits / 26, atol=1e-5)


def test_clipscore_is_clips_logit_over_30(tiny_clip: Path, images: Tensor, logits: Tensor) -> None:
    scores = ClipScore(model=tiny_clip)(images, PROMPTS, [{}] * 4)
    assert torch.allclose(scores, logits / 30, atol=1e-5)
    assert scores.std() > 1e-3  # the random model does tell them apart


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_do_not_depend_on_the_batch_size(tiny_clip: Path, images: Tensor, batch_size: int) -> None:
    whole = ClipScore(model=tiny_clip)(images, PROMPTS, [{}] * 4)
    assert torch.allclose(
        ClipScore(model=tiny_clip, batch_size=batch_size)(images, PROMPTS, [{}] * 4), whole, atol=1e-5
    )


def test_features_are_normalised_and_detached(tiny_clip: Path, images: Tensor) -> None:
    clip = Clip(tiny_clip, reward="test")
    for features in (clip.images(to_pil(images, "test")), clip.texts(PROMPTS)):
        assert features.shape == (4, 24)
        assert torch.allclose(features.norm(dim=-1), torch.ones(4), atol=1e-5)
        assert not features.requires_grad
    assert clip.images([]).shape == clip.texts([]).shape == (0, 24)


def test_a_prompt_is_truncated_to_77_tokens(tiny_clip: Path) -> None:
    clip = Clip(tiny_clip, reward="test")
    long = "x" * 200
    features = clip.texts([long, long + "y", "y" + long])
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2])


def test_a_model_without_safetensors_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    for file in tiny_clip.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        ClipScore(model=tmp_path)


def test_options_reach_the_model(tiny_clip: Path, images: Tensor) -> None:
    total = build({"clipscore": 2.0}, options={"clipscore": {"model": tiny_clip}})
    assert isinstance(total.rewards["clipscore"], Reward)
    scores = total.scores(images, PROMPTS, [{}] * 4)
    assert torch.allclose(scores.total, 2 * scores.parts["clipscore"])


@pytest.fixture
def head() -> dict[str, Tensor]:
    """A predictor's layers with the numbers of the published one, which has dropout layers in between."""
    generator = torch.Generator().manual_seed(3)
    shapes = {0: (8, 24), 2: (4, 8), 3: (1, 4)}
    layers: dict[str, Tensor] = {}
    for number, shape in shapes.items():
        layers[f"layers.{number}.weight"] = torch.randn(shape, generator=generator)
        layers[f"layers.{number}.bias"] = torch.randn(shape[0], generator=generator)
    return layers


def saved(head: dict[str, Tensor], folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(head, folder / "head.safetensors")
    return folder / "head.safetensors"


def test_aesthetic_applies_its_layers_to_image_features(
    tiny_clip: Path, images: Tensor, head: dict[str, Tensor], tmp_path: Path
) -> None:
    reward = Aesthetic(model=tiny_clip, head=saved(head, tmp_path))
    values = Clip(tiny_clip, reward="test").images(to_pil(images, "test"))
    for number in (0, 2, 3):
        values = linear(values, head[f"layers.{number}.weight"], head[f"layers.{number}.bias"])
    scores = reward(images, PROMPTS, [{}] * 4)
    assert scores.shape == (4,)
    assert torch.allclose(scores, values[:, 0], atol=1e-5)


def test_layers_are_ordered_by_number() -> None:
    widths = [24, *range(30, 41), 1]
    layers = {f"layers.{n}.weight": torch.zeros(widths[n + 1], widths[n]) for n in range(12)}
    layers |= {f"layers.{n}.bias": torch.zeros(widths[n + 1]) for n in range(12)}
    assert [weight.shape[1] for weight, _ in linear_chain(layers, 24)] == widths[:-1]  # 10 after 9, not after 1


def test_aesthetic_without_a_head_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="requires the option 'head': a safetensors file"):
        Aesthetic()
    with pytest.raises(FileNotFoundError, match=r"head must be an existing file, got .*absent.safetensors'"):
        Aesthetic(head=tmp_path / "absent.safetensors")


def test_a_head_of_another_shape_is_refused(head: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="map 768 features to one number"):
        linear_chain(head, 768)
    with pytest.raises(ValueError, match="map 24 features to one number"):
        linear_chain({**head, "layers.3.weight": torch.zeros(2, 4), "layers.3.bias": torch.zeros(2)}, 24)
    with pytest.raises(ValueError, match="map 24 features"):
        linear_chain({**head, "layers.2.weight": torch.zeros(4, 9)}, 24)
    for wrong in ({}, {**head, "other": torch.zeros(1)}, {k: v for k, v in head.items() if k != "layers.2.bias"}):
        with pytest.raises(ValueError, match=r"layers.N.weight and layers.N.bias"):
            linear_chain(wrong, 24)
