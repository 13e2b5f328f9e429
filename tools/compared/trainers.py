"""What trainers do with attention and with the advantage, read in their sources: nothing of them is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names that code with attention maps has.
MAPS = re.compile(r"\b(cross_)?(attention_?maps?|attn_?maps?|attention_probs|attn_probs)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Trainer:
    package: str  # the folder whose modules are searched for maps
    credit: str
    statements: tuple[tuple[str, str], ...]  # file and text in it that credit follows from


_MEAN = "log_prob.mean(dim=tuple(range(1, log_prob.ndim)))"
TRAINERS = {
    "flow-grpo": Trainer(
        "flow_grpo",
        "the same at every location and step",
        (
            ("flow_grpo/diffusers_patch/sd3_sde_with_logprob.py", _MEAN),
            ("scripts/train_sd3.py", 'samples["rewards"]["avg"].unsqueeze(1).repeat(1, num_train_timesteps)'),
        ),
    ),
    "verl-omni": Trainer(
        "verl_omni",
        "the same at every location and step",
        (
            ("verl_omni/pipelines/schedulers/flow_match_sde.py", _MEAN),
            ("verl_omni/trainer/diffusion/ray_diffusion_trainer.py", 'batch.batch["sample_level_scores"].expand('),
        ),
    ),
}


def read(name: str, checkout: Path) -> dict[str, Any]:
    """What the sources of a trainer say.

    Raises:
        SystemExit: a statement is not in its file, so the trainer has changed and must be read again.
    """
    trainer = TRAINERS[name]
    for file, text in trainer.statements:
        path = checkout / file
        if not path.is_file() or text not in path.read_text(encoding="utf-8"):
            raise SystemExit(f"{name}: {file} does not contain {text!r}; read the trainer again")
    files = sorted((checkout / trainer.package).rglob("*.py"))
    with_maps = [str(f.relative_to(checkout)) for f in files if MAPS.search(f.read_text(encoding="utf-8"))]
    return {
        "credit": trainer.credit,
        "statements": [list(statement) for statement in trainer.statements],
        "files": len(files),
        "files_with_maps": with_maps,
    }
