"""VeRL-Omni's own tests, with its classes and with ours in their place.

``python -m tools.clients.verl_omni_tests DIR REPORT [--ours]`` runs them once and writes the outcome of each.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from star_kernels.integrations.verl_omni import ALGORITHMS, register
from tools.clients.interface import Finding
from tools.clients.loading import prepare
from tools.clients.verl_omni_world import OPTIONAL, WHOLE

# Those that use losses, adapters, engines or the attention settings. Tests that need a package that is missing fail
# with VeRL-Omni's classes too, and are not compared.
FILES = (
    "tests/trainer/diffusion/test_diffusion_core_algos_on_cpu.py",
    "tests/trainer/diffusion/test_diffusion_distillation_losses_on_cpu.py",
    "tests/trainer/diffusion/test_diffusion_registry_on_cpu.py",
    "tests/trainer/diffusion/test_rollout_correction_on_cpu.py",
    "tests/pipelines/test_diffusion_model_base_on_cpu.py",
    "tests/pipelines/test_image_edit_interface_on_cpu.py",
    "tests/pipelines/test_ltx2_flow_grpo_on_cpu.py",
    "tests/pipelines/test_minimax_h3_diffusion_nft_on_cpu.py",
    "tests/utils/test_diffusion_attention_on_cpu.py",
    "tests/workers/config/test_diffusion_config_on_cpu.py",
)


def check(folder: Path) -> Iterator[Finding]:
    """A finding for each file: every test that passes with VeRL-Omni's classes passes with ours."""
    theirs, ours = (_outcomes(folder, option) for option in ((), ("--ours",)))
    for file in FILES:
        passed = {name for name, outcome in theirs.items() if name.startswith(file) and outcome == "passed"}
        broken = sorted(name for name in passed if ours.get(name) != "passed")
        others = sum(name.startswith(file) for name in theirs) - len(passed)
        figure = f"{len(passed)} tests" + (f", {others} cannot run here" if others else "")
        yield Finding(f"their {file}", bool(passed) and not broken, ", ".join(broken) or figure)


def _outcomes(folder: Path, options: tuple[str, ...]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        command = [sys.executable, "-m", "tools.clients.verl_omni_tests", str(folder), str(report), *options]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not report.exists():
            raise RuntimeError(f"{' '.join(command)} wrote no report")
        found: dict[str, str] = json.loads(report.read_text())
    return found


class _Report:
    """A pytest plugin that collects outcomes."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"


def main(folder: Path, report: Path, ours: bool) -> None:
    """Runs the files and writes the outcome of each test."""
    import pytest

    prepare(folder, "verl_omni", whole=WHOLE, optional=OPTIONAL)
    if ours:
        algorithms = importlib.import_module(ALGORITHMS)
        for made in register().values():
            setattr(algorithms, made.replaced.__name__, made)  # type: ignore[attr-defined]
    os.chdir(folder)  # the tests read configurations relative to it
    plugin = _Report()
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(folder)]
    pytest.main([*options, *FILES], plugins=[plugin])
    report.write_text(json.dumps(plugin.outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), "--ours" in sys.argv[3:])
