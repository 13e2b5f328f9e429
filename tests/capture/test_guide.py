"""The adapter in docs/adding-a-model.md works as written."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import IMAGE, TEXT, Case, hunyuan_image, hunyuan_image_inputs

from star_kernels.capture import capture_maps, family

GUIDE = Path(__file__).parents[2] / "docs/adding-a-model.md"


@torch.no_grad()
def test_the_adapter_of_the_guide_gives_the_maps_of_the_reference(monkeypatch):
    adapter = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL).group(1)
    assert len(adapter.splitlines()) <= 30
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    exec(compile(adapter, str(GUIDE), "exec"), {})
    case = Case(hunyuan_image, hunyuan_image_inputs, (0, IMAGE), IMAGE)
    model, inputs = case.make()
    with capture_maps(model, case.selection, cfg=None) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, expected_maps(model, inputs, case, case.selection), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_module_without_the_given_rows_is_named(monkeypatch):
    others = {name: known for name, known in family.FAMILIES.items() if name != "HunyuanImageTransformer2DModel"}
    monkeypatch.setattr(family, "FAMILIES", others)
    case = Case(hunyuan_image, hunyuan_image_inputs, (0, IMAGE), IMAGE)
    model, inputs = case.make()
    options = {"rows": (0, IMAGE), "grid": (6, 10), "text": (IMAGE, TEXT), "cfg": None}
    with (
        pytest.raises(
            ValueError, match=r"context_embedder\.\S+attn has .* choose other rows, or leave the module out of blocks"
        ),
        capture_maps(model, case.selection, **options),
    ):
        model(**inputs)
    with capture_maps(model, case.selection, blocks=[1, 2], **options) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, expected_maps(model, inputs, case, case.selection), rtol=0, atol=1e-5)
