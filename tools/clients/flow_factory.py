"""The interface of Flow-Factory's GRPO trainers, in a checkout with src/flow_factory (commit b30dc00 or later)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.clients.interface import Finding, compare

GRPO = "src/flow_factory/trainers/rl/grpo.py"
INTERFACE = {
    GRPO: {
        "GRPOTrainer.optimize": ["self", "samples"],
        "GRPOGuardTrainer._guard_ratio": ["self", "output", "replay", "old_state_mean", "step_index="],
    },
    "src/flow_factory/trainers/registry.py": {"register_trainer": ["name"], "get_trainer_class": ["identifier"]},
    "src/flow_factory/train.py": {"main": []},
}
# Of the class that the trainers inherit, whose file differs between versions.
INHERITED = {
    "_replay_forward": ["self", "batch", "replay", "return_fields"],
    "_require_policy_log_prob": ["self", "output", "step_index", "batch_size"],
    "_require_replay_log_prob": ["self", "replay", "step_index"],
    "_canonical_return_fields": ["self", "fields"],
}


def check(folder: Path) -> Iterator[Finding]:
    """Compares the signatures that star_kernels.integrations.flow_factory uses."""
    yield from compare(folder, INTERFACE)
    files = [path.relative_to(folder) for path in sorted((folder / "src/flow_factory/trainers").rglob("*.py"))]
    text = {file: (folder / file).read_text() for file in files}
    for name, parameters in INHERITED.items():
        found = [str(file) for file, source in text.items() if f"def {name}(" in source]
        if not found:
            yield Finding(f"{name}", False, "no class of trainers has it: the version is too old")
        for file in found:
            classes = [
                line.split()[1].split("(")[0].rstrip(":")
                for line in text[Path(file)].splitlines()
                if line.startswith("class ")
            ]
            outcomes = [next(compare(folder, {file: {f"{made}.{name}": parameters}})) for made in classes]
            yield next((outcome for outcome in outcomes if outcome.passed), outcomes[-1])
