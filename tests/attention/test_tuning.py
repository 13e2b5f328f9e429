"""Which kernels a GPU runs: the table, its nearest entry, and the defaults without an entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from star_kernels.attention import dispatch, triton_config, tuning, vendor
from star_kernels.attention.triton_config import BackwardConfig, Tile
from star_kernels.attention.tuning import Plan

DEVICE = "NVIDIA H100 80GB HBM3"
HOPPER, AMPERE = (9, 0), (8, 0)


def entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "bfloat16", "head_dim": 64, "size_class": 10, "forward": "triton", "backward": "flash",
            "flash": "FA2", **changed}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A device whose tables lie in the folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: HOPPER)
    monkeypatch.setenv("STAR_KERNELS_TUNED", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    tuning.table.cache_clear()
    dispatch._plan.cache_clear()


def plan(length: int = 1357, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Plan:
    return dispatch.plan(torch.device("cuda", 0), dtype, head_dim, length, length)


def test_the_nearest_class_of_lengths_is_taken(gpu: Path) -> None:
    tuning.write_table(gpu, DEVICE, {}, [entry(), entry(size_class=12, forward="cudnn"), entry(head_dim=128)])
    assert tuning.size_class(1357, 1357) == 10
    assert tuning.size_class(4429, 4429) == 12
    assert plan(1357) == plan(200) == Plan("triton", "flash", measured=True)
    assert plan(4429) == plan(9000) == Plan("cudnn", "flash", measured=True)


def test_float16_and_bfloat16_substitute_each_other_but_not_float32(gpu: Path) -> None:
    tuning.write_table(gpu, DEVICE, {}, [entry()])
    assert plan(dtype=torch.float16).measured
    assert not plan(dtype=torch.float32).measured
    forget()
    tuning.write_table(gpu, DEVICE, {}, [entry(), entry(dtype="float16", forward="cudnn")])
    assert plan(dtype=torch.float16).forward == "cudnn"
    assert plan(dtype=torch.bfloat16).forward == "triton"


def test_tiles_of_an_entry_are_those_of_the_launch(gpu: Path) -> None:
    tiles = {"forward": [128, 64, 8, 3, 128], "query": [64, 32, 4, 2], "key_value": [32, 64, 4, 2, None]}
    tuning.write_table(gpu, DEVICE, {}, [entry(tiles=tiles)])
    assert plan().forward_tile == Tile(128, 64, 8, 3, 128)
    assert plan().backward_config == BackwardConfig(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))


def test_an_entry_for_another_flash_attention_does_not_apply(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write_table(gpu, DEVICE, {}, [entry(forward="flash", flash="FA3"), entry(forward="cudnn", backward="cudnn")])
    assert plan().forward == "cudnn"
    monkeypatch.setattr(vendor, "flash_implementation", lambda: "FA3")
    assert plan().forward == "flash"
    forget()
    tuning.write_table(gpu, DEVICE, {}, [entry()])  # Triton was faster, but than FA2
    assert not plan().measured


def test_an_entry_whose_kernel_does_not_support_the_call_is_skipped(gpu: Path) -> None:
    tuning.write_table(gpu, DEVICE, {}, [entry(dtype="float32", forward="cudnn")])
    assert not plan(dtype=torch.float32).measured


def test_a_table_of_another_device_does_not_apply(gpu: Path) -> None:
    tuning.write_table(gpu, "NVIDIA A100-SXM4-80GB", {}, [entry(forward="cudnn")])
    assert not plan().measured


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "kernel"),
    [
        (torch.bfloat16, 64, (10, 0), "triton"),
        (torch.float16, 32, AMPERE, "triton"),
        (torch.bfloat16, 128, HOPPER, "cudnn"),
        (torch.bfloat16, 128, AMPERE, "flash"),
        (torch.bfloat16, 128, (12, 0), "flash"),
        (torch.float16, 128, (7, 5), "efficient"),
        (torch.bfloat16, 512, HOPPER, "efficient"),
        (torch.float32, 64, HOPPER, "efficient"),
        (torch.float32, 512, HOPPER, "efficient"),
    ],
)
def test_without_a_table_the_stated_heuristic_holds(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], kernel: str
) -> None:
    assert dispatch.default_plan(dtype, head_dim, capability) == Plan(kernel, kernel)


def test_narrow_heads_on_hopper_use_cudnn_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.default_plan(torch.bfloat16, 64, HOPPER) == Plan("triton", "cudnn")
    monkeypatch.setattr(dispatch, "cudnn_problem", lambda: "too old")
    assert dispatch.default_plan(torch.bfloat16, 64, HOPPER) == Plan("triton", "triton")


def test_an_activated_flash_attention_comes_before_cudnn() -> None:
    for flash, kernel in (("FA2", "cudnn"), ("FA3", "flash"), ("FA4", "flash")):
        assert dispatch.default_plan(torch.bfloat16, 128, HOPPER, flash).forward == kernel


def test_flash_has_no_backward_pass_of_wide_heads_on_small_gpus() -> None:
    assert dispatch.default_plan(torch.bfloat16, 256, (8, 9)) == Plan("flash", "efficient")
    assert dispatch.default_plan(torch.bfloat16, 256, AMPERE) == Plan("flash", "flash")


def test_without_triton_plans_have_only_pytorchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_problem", lambda: "the package triton is not installed")
    assert dispatch.default_plan(torch.bfloat16, 64, HOPPER) == Plan("cudnn", "cudnn")
    assert dispatch.default_plan(torch.float32, 64, HOPPER) == Plan("efficient", "efficient")


def test_vendor_selects_the_fastest_of_pytorchs_kernels() -> None:
    def best(chosen: Plan, dtype: torch.dtype, capability: tuple[int, int]) -> Plan:
        return dispatch.vendor_plan(chosen, dtype, 64, capability, "FA2")

    assert best(Plan("triton", "flash"), torch.bfloat16, HOPPER) == Plan("cudnn", "flash")
    assert best(Plan("triton", "triton"), torch.bfloat16, AMPERE) == Plan("flash", "flash")
    assert best(Plan("triton", "triton"), torch.float32, HOPPER) == Plan("efficient", "efficient")


def test_a_mask_selects_triton_whatever_the_table_says() -> None:
    query = torch.empty(1, 1, 4, 8)
    assert dispatch.plan_of_call("auto", query, query, torch.ones(1, 4, dtype=torch.bool)) == Plan("triton", "triton")
    assert dispatch.plan_of_call("cudnn", query, query, None) == Plan("cudnn", "cudnn")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a table written by"),
        ('{"entries": 3}', "must be a table written by"),
        (json.dumps({"entries": [entry(forward="fast")]}), "entry 0 has forward = 'fast'"),
        (json.dumps({"entries": [entry(), entry(head_dim=None)]}), "entry 1 has head_dim = None"),
        (json.dumps({"entries": [entry(tiles={"forward": [64]})]}), "must be a table written by"),
    ],
)  # fmt: skip
def test_an_invalid_table_is_an_error_that_names_it(gpu: Path, content: str, message: str) -> None:
    (gpu / f"{tuning.slug(DEVICE)}.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        plan()
    assert str(gpu) in str(error.value)


def test_the_tables_that_ship_can_be_read() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        assert tuning._read(path)
        assert path.stem == tuning.slug(json.loads(path.read_text())["device"])


@pytest.mark.parametrize(
    ("capability", "family"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_80")],
    ids=str,
)
def test_a_gpu_without_its_own_tiles_uses_those_of_sm_80(
    capability: tuple[int, int], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    triton_config._architecture.cache_clear()
    assert triton_config.architecture(torch.device("cuda")) == family
    monkeypatch.setattr(torch.version, "hip", "6.4")
    triton_config._architecture.cache_clear()
    assert triton_config.architecture(torch.device("cuda", 1)) == "gfx9"
    triton_config._architecture.cache_clear()
    assert triton_config.architecture(torch.device("cpu")) == "sm_80"  # the interpreter


def test_a_head_wider_than_every_tile_is_an_error() -> None:
    with pytest.raises(ValueError, match="head_dim must be at most 128 for the Triton kernels, got 129"):
        triton_config.forward_config("sm_90", 129, torch.bfloat16)
    assert triton_config.descriptor_tiles(64) == triton_config.descriptor_tiles(129) == ()
    assert all(tile.descriptors for tile in triton_config.descriptor_tiles(128))
