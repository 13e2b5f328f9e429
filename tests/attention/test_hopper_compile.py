"""The kernel for Hopper as nvcc compiles it, if it is installed: registers, products, waits. Nothing runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import kernel_driver
import pytest
from build_folder import build_folder

from star_kernels.attention.hopper import DEFAULTS, VARIANTS, Variant

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    *((dtype, head_dim, shape) for head_dim, shape in DEFAULTS.items() for dtype in ("bfloat16", "half")),
    *(("bfloat16", head_dim, Variant(*shape)) for head_dim, shapes in VARIANTS.items() for shape in shapes),
}
Key = tuple[str, int, Variant]


@pytest.fixture(scope="module")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[Key, str]]:
    """The report of ptxas, and the machine code of each shape of the kernel."""
    setup = kernel_driver.setup()
    names = setup["HOPPER_KERNELS"]
    with pytest.MonkeyPatch.context() as patch, build_folder("libstar_kernels_cuda", tmp_path_factory) as folder:
        patch.delenv("STAR_KERNELS_CUDA_ARCHS", raising=False)
        setup["run_ninja"](folder, setup["cuda_rules"](folder), *(f"{name}.o" for name in names))
        report = "".join((folder / f"{name}.o.txt").read_text() for name in names)
        code: dict[Key, str] = {}
        for name in names:
            code.update(functions(disassembled(folder / f"{name}.o")))
    return report, code


def disassembled(file: Path) -> str:
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))
    if tool is None:
        pytest.skip("needs cuobjdump, of CUDA or of triton")
    return subprocess.run([tool, "-sass", str(file)], capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[Key, str]:
    """The code of each shape, by the arguments of its template in the mangled name."""
    found = {}
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL):
        dtype, *numbers = re.search(r"5ShapeI\d+_*(half|nv_bfloat16)L(.*?)EEE", name).groups()
        head_dim, consumers, keys, stages, overlap = map(int, re.findall(r"[ib](\d+)", numbers[0]))
        found[dtype.removeprefix("nv_"), head_dim, Variant(consumers, keys, stages, overlap)] = body
    return found


def test_every_shape_is_compiled(compiled: tuple[str, dict[Key, str]]) -> None:
    assert set(compiled[1]) == SHAPES


def test_nothing_spills_and_no_product_is_serialised(compiled: tuple[str, dict[Key, str]]) -> None:
    report, code = compiled
    assert "(C75" not in report  # such as C7510 and C7512, products that wait for one another
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(used) == len(SHAPES)
    assert set(used) == {("0", "0", "0")}
    for key, body in code.items():
        assert not re.search(r"\b(LDL|STL)\b", body), key


def test_products_start_together_and_are_waited_for_together(compiled: tuple[str, dict[Key, str]]) -> None:
    for (dtype, head_dim, shape), body in compiled[1].items():
        scores, values, tokens = (len(re.findall(rf"HGMMA\.64x{n}x16", body)) for n in (shape.keys, head_dim, 16))
        # Scores: those of the first keys, and in the loop. Values: in the loop, and the last ones.
        expected = (2 * head_dim // 16, 2 * shape.keys // 16, 2 * head_dim // 16)
        if shape.keys == head_dim:
            expected = (expected[0] + expected[1], expected[0] + expected[1], expected[2])
        assert (scores, values, tokens) == expected, (dtype, head_dim, shape)
        assert body.count("WARPGROUP.ARRIVE") <= 6
        assert body.count("WARPGROUP.DEPBAR") <= 7


def test_exponentials_run_while_the_values_are_multiplied(compiled: tuple[str, dict[Key, str]]) -> None:
    """In the loop, all of them lie between the wait for the scores and the wait for the values."""
    for key, body in compiled[1].items():
        if not key[2].overlap:
            continue
        found = re.findall(r"HGMMA|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2", body)
        waits = [i for i, name in enumerate(found) if name.startswith("WARPGROUP")]
        between = found[waits[1] + 1 : waits[2]]  # the first wait is that for the first scores
        assert found[waits[1]].endswith("0x1"), key
        assert between == ["MUFU.EX2"] * (key[2].keys // 2 + 2), key


def test_registers_differ_by_role(compiled: tuple[str, dict[Key, str]]) -> None:
    for (_, _, shape), body in compiled[1].items():
        producer, consumer = 40, 232 if shape.consumers == 2 else 152
        assert f"USETMAXREG.DEALLOC.CTAPOOL {producer:#x}" in body
        assert re.search(rf"USETMAXREG\.TRY_ALLOC\.CTAPOOL \w+, {consumer:#x}", body)
        assert 128 * producer + 128 * shape.consumers * consumer <= 65536


def test_tiles_come_in_bulk_copies(compiled: tuple[str, dict[Key, str]]) -> None:
    for key, body in compiled[1].items():
        assert body.count("UTMALDG.4D") >= 3, key  # queries, keys, values
        assert "HMMA" not in body.replace("HGMMA", ""), key


def test_shared_memory_fits_into_a_block() -> None:
    for _, head_dim, shape in SHAPES:
        tiles = 64 * shape.consumers + 2 * shape.stages * shape.keys + 2 * 16
        assert 2 * head_dim * tiles + 1024 <= 227 * 1024
