"""The model card of a run, and its upload to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from star_kernels import __version__
from star_trainer.config import Config
from star_trainer.redact import redacted

LOADING = {
    True: 'pipeline = DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("{here}")',
    False: 'transformer = AutoModel.from_pretrained("{here}", subfolder="transformer")\n'
    'pipeline = DiffusionPipeline.from_pretrained("{base}", transformer=transformer)',
}


def model_card(config: Config, epochs: int, metrics: list[dict[str, Any]], *, image: str | None = None) -> str:
    """README.md of the trained weights.

    Args:
        epochs: number of completed epochs.
        metrics: the lines of metrics.jsonl; the first and the last evaluation are shown.
        image: file name of the reward curve beside the card.
    """
    lora, path = config.model.lora_rank > 0, config.model.path
    on_hub = path.count("/") == 1 and not path.startswith((".", "/")) and not Path(path).exists()
    base = path if on_hub else Path(path).name  # no path of this machine
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front |= {"base_model": base} if on_hub else {}
    front["tags"] = ["star-kernels", config.train.objective, *(["lora"] if lora else [])]
    settings = redacted(asdict(config))
    settings["model"]["path"] = base
    del settings["reward"]["options"]  # may contain such paths
    shown = {section: settings[section] for section in ("model", "rollout", "allocation", "reward", "train")}
    found = [line for line in metrics if line["event"] == "evaluation"]
    evaluations = {line["epoch"]: line for line in (found[:1] + found[-1:])}
    names = [name for name in (found[-1] if found else {}) if name.split("/")[0] == "reward"]
    rows = [["epoch", *names], ["---"] * (1 + len(names))]
    rows += [
        [str(epoch), *(f"{line[name]:.4f}" if name in line else "" for name in names)]
        for epoch, line in evaluations.items()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows) if found else "The run has no evaluations."
    here = config.output.push_to_hub or "final"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {base}, trained with {config.train.objective}

{f"LoRA adapters of rank {config.model.lora_rank}" if lora else "The transformer"} of {base}, trained by reinforcement
learning with `star-train` of star-kernels {__version__}: {epochs} epochs of {config.samples} samples.
The weights are {"their moving average" if config.train.ema else "those after the last epoch"}.

```python
from diffusers import {"DiffusionPipeline" if lora else "AutoModel, DiffusionPipeline"}

{LOADING[lora].format(base=base, here=here)}
```

## Evaluation

{table}
{f"{chr(10)}![Rewards over epochs]({image}){chr(10)}" if image else ""}
## Settings

```yaml
{yaml.safe_dump(shown, sort_keys=False).strip()}
```
"""


def upload(folder: Path, repository: str) -> None:
    """Uploads a folder to a model repository on the hub, which is created as a private one if it does not exist."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
