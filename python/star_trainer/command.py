"""``star-train``: post-trains a text-to-image flow model with Flow-GRPO and STAR's allocation.

Options override YAML files (--config), and files override the preset, in any order on the command line. ``star-train
--help`` lists all settings with the values of the preset, ``--print_config`` prints the values of a command line.

    star-train                                          the small model, a few minutes on two CPU cores
    star-train --preset sd35m-geneval                   Flow-GRPO's published settings for SD3.5-Medium
    accelerate launch --num_processes 8 -m star_trainer --preset sd35m-ocr --data.prompts prompts.txt
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from star_trainer import settings
from star_trainer.config import Config
from star_trainer.limits import check_values
from star_trainer.redact import RedactingFormatter, redact, redact_warnings, redacted_traceback

PRESETS = Path(__file__).parent / "presets"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, or 1 after an error; invalid settings exit with status 2."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    import torch

    from star_trainer.rewards.base import RewardError
    from star_trainer.trainer import Trainer

    try:
        trainer = Trainer(config)
        trainer.run()
    except KeyboardInterrupt:  # before the training loop
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError, RewardError) as error:
        print(f"star-train: error: {redact(str(error))}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"star-train: error: {error}", file=sys.stderr)
        print("Resume (output.resume) with a smaller rollout.batch or train.batch, or with", file=sys.stderr)
        print("model.gradient_checkpointing: these change results by rounding errors only.", file=sys.stderr)
        return 1
    except Exception as error:
        print(redacted_traceback(error), end="", file=sys.stderr)
        return 1
    if trainer.accelerator.is_main_process:
        with suppress(OSError):  # standard output is closed
            print(summary(trainer.folder))
    return 0


def entry() -> NoReturn:
    """The console script: runs :func:`main` and ends the process.

    If a reward hangs, or is still computing when an error ends the run, its thread is within C++, and Python's normal
    exit would abort (SIGABRT). Such a process exits without cleaning up.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not closed; paths may contain characters outside the encoding
            stream.reconfigure(errors="backslashreplace")
    redact_warnings()
    if os.getcwd() not in sys.path:  # a reward may be a module of the current directory, as with python -m
        sys.path.append(os.getcwd())
    try:
        status = main()
    except Exception as error:
        print(redacted_traceback(error), end="", file=sys.stderr)
        status = 1
    working = [thread for thread in threading.enumerate() if thread.name.startswith("reward")]
    for thread in working:
        thread.join(1.0)
    if any(thread.is_alive() for thread in working):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def summary(folder: Path) -> str:
    """The first and the last evaluation of a run, and the folder of its outputs."""
    from star_trainer.record import read_metrics

    found = [line for line in read_metrics(folder) if line["event"] == "evaluation"]
    lines = [
        f"evaluation after epoch {line['epoch']}: reward {line['reward']:.4f}" for line in (found[:1] + found[-1:])
    ]
    return "\n".join([*dict.fromkeys(lines), f"metrics and images are in {folder}"])


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line. Exits with status 2 and a message if it is invalid."""
    from jsonargparse import ArgumentError

    first = argparse.ArgumentParser(prog="star-train", add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", action="append", default=[])
    try:
        given, rest = first.parse_known_args(arguments)
        files = [(path, settings.read(os.path.expanduser(path))) for path in given.config]
        named = [found.pop("preset") for _, found in files if "preset" in found]
        parser = build_parser(given.preset or (named or ["small"])[-1])
        values = None
        for path, found in files:
            values = merged(parser, path, found, values)
        config = config_of(parser, parser.parse_args(rest, values))
        check_values(config)
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        fail(str(error))
    return config


def build_parser(preset: str) -> Any:
    """The parser of :class:`Config` with the values of a preset as defaults; it raises instead of exiting.

    Raises:
        ValueError: an unknown preset.
    """
    from docstring_parser import DocstringStyle
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_loader, set_parsing_settings

    class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Prints the description as it is written, and the preset's value of each setting."""

    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if preset not in names:
        raise ValueError(f"--preset must be one of {', '.join(names)}, got {preset!r}")
    set_parsing_settings(docstring_parse_style=DocstringStyle.GOOGLE)
    set_loader("strict-yaml", settings.load, exceptions=(settings.YAMLError,))
    parser = ArgumentParser(
        prog="star-train",
        usage="star-train [--preset NAME] [--config FILE] [--SECTION.SETTING VALUE ...]",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=Help,
        default_config_files=[str(PRESETS / f"{preset}.yaml")],
        parser_mode="strict-yaml",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--preset", default=preset, choices=names, help="base settings")
    parser.add_argument(
        "--config", action="config", help="YAML file of settings that override the preset; may be repeated"
    )
    parser.add_class_arguments(Config)
    return parser


def merged(parser: Any, path: str, found: dict[str, Any], values: Any) -> Any:
    """The values, overridden by the settings of a file."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_object(found, values)
    except ArgumentError as error:
        raise ValueError(f"{path}: {error}") from error


def config_of(parser: Any, values: Any) -> Config:
    """The configuration of parsed values.

    Raises:
        ValueError: a required setting is null.
    """
    for section, kind in get_type_hints(Config).items():
        for name, allowed in get_type_hints(kind).items():
            if values[section][name] is None and type(None) not in get_args(allowed):
                raise ValueError(f"{section}.{name} must not be null")
    made = parser.instantiate(values)
    return Config(**{name: getattr(made, name) for name in Config.__dataclass_fields__})


def fail(message: str) -> NoReturn:
    """Exits with status 2 and a message; for an unknown option it suggests the most similar one."""
    unknown = re.match(r"unrecognized arguments: --([\w.]+)", message)
    if unknown:
        known = [f"{section}.{name}" for section, names in settings.SECTIONS.items() for name in names]
        message += settings.suggestion(unknown[1], known, before="--")
    if 'Parser key "reward.weights"' in message:
        message += "\n  It maps each reward to its weight, such as --reward.weights '{ocr: 1.0, pickscore: 0.5}'."
    print(f"star-train: error: {redact(message)}\nstar-train --help describes all settings.", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    entry()
