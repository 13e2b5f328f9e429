"""The table of models in docs/models.md is that of the cases of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import diffusers
from image_cases import IMAGE_CASES

from star_kernels.capture.family import FAMILIES

PAGE = Path(__file__).parents[2] / "docs/models.md"
HALVES = {"last": "doubled, last half", "first": "doubled, first half", None: "separate passes"}
# Tested by tests/capture/test_families.py and test_guidance.py.
OLDER = {
    "SD3Transformer2DModel": "SD3, SD3.5",
    "FluxTransformer2DModel": "FLUX.1, Kontext",
    "Flux2Transformer2DModel": "FLUX.2, Klein",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "UNet2DConditionModel": "SD 1, SD 2, SDXL",
    "PixArtTransformer2DModel": "PixArt",
    # Tested by tests/capture/test_video.py too.
    "WanTransformer3DModel": "Wan 2.1, Wan 2.2",
    "LTXVideoTransformer3DModel": "LTX-Video",
    "LTX2VideoTransformer3DModel": "LTX-2",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo-1.5",
}


def table() -> str:
    rows = ["| model | class | order of the keys | guidance | pipelines |", "|---|---|---|---|---|"]
    for name, case in IMAGE_CASES.items():
        model = type(case.model()).__name__
        rows.append(f"| {name} | `{model}` | {case.order} | {HALVES[case.cfg]} | {case.pipelines} |")
    return "\n".join(rows)


def test_the_table_is_that_of_the_cases() -> None:
    assert table() in PAGE.read_text()


def test_every_family_is_on_the_page() -> None:
    text = PAGE.read_text()
    tested = {type(case.model()).__name__ for case in IMAGE_CASES.values()}
    assert set(FAMILIES) <= tested | set(OLDER)
    for name, models in OLDER.items():
        assert f"| {models} | `{name}` |" in text


def test_the_guidance_of_the_table_is_that_of_the_families() -> None:
    for case in IMAGE_CASES.values():
        assert FAMILIES[type(case.model()).__name__].cfg == case.cfg


def test_models_that_are_left_out_exist_and_have_no_adapter() -> None:
    left_out = PAGE.read_text().partition("## Left out")[2]
    names = [line.split("`")[1] for line in left_out.splitlines() if line.startswith("| `")]
    assert len(names) > 10
    assert [name for name in names if not hasattr(diffusers, name) or name in FAMILIES] == []


if __name__ == "__main__":
    print(table())
