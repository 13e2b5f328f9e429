"""Makes rewards from names, import paths and URLs."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from typing import Any, cast

import torch

from star_trainer.redact import HIDDEN, is_secret, redact, redacted, remember_options
from star_trainer.rewards.base import Reward
from star_trainer.rewards.function import FunctionReward
from star_trainer.rewards.remote import RemoteReward, public_address
from star_trainer.rewards.weighted import WeightedSum, check_weight
from star_trainer.suggestion import suggestion

BUILT_IN = {
    "scene": "star_trainer.scenes:SceneReward",
    "geneval": "star_trainer.rewards.geneval.reward:GenEval",
    "ocr": "star_trainer.rewards.ocr:Ocr",
    "pickscore": "star_trainer.rewards.pickscore:PickScore",
    "clipscore": "star_trainer.rewards.clipscore:ClipScore",
    "aesthetic": "star_trainer.rewards.aesthetic:Aesthetic",
    "jpeg-compressibility": "star_trainer.rewards.jpeg:JpegCompressibility",
}


def build(
    weights: Mapping[str, float],
    *,
    device: str | torch.device = "cpu",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> WeightedSum:
    """Makes a weighted sum of rewards.

    Args:
        weights: weight of each reward by key. A key is

            - the name of a built-in reward (``BUILT_IN``);
            - ``"package.module:attribute"``: a :class:`Reward`; a function of ``(images, prompts)`` or ``(images,
              prompts, metadata)``, which then is the reward, with the key's options as further keyword arguments; or a
              class or another function, which is called with the key's options and returns a reward;
            - an ``http://`` or ``https://`` URL (:class:`RemoteReward`).
        device: where models run; passed to constructors that have a parameter ``device``.
        options: keyword arguments of each reward by key.

    Returns:
        The sum. Its parts have the names of built-in rewards, or the rewards' own ``name``; repeated names are numbered
        ("mine", "mine-2").

    Raises:
        ValueError: an unknown key, options for a key without a weight, options that the reward does not accept, a
            weight that is not finite, or no weights.
        TypeError: an import path that is not a reward, or weights or options that are not mappings.
        ImportError: a module or a package is missing.
    """
    options = {} if options is None else options
    _check_shape("weights", weights)
    _check_shape("options", options)
    remember_options(options)
    for key, given in options.items():
        _check_shape(f"options of {redact(key)!r}", given)
    stray = sorted(set(options) - set(weights))
    if stray:
        shown = ", ".join(map(redact, weights))
        raise ValueError(
            f"options must be for rewards with a weight ({shown}), got options for {[*map(redact, stray)]}"
        )
    rewards: dict[str, Reward] = {}
    named: dict[str, float] = {}
    for key, weight in weights.items():
        checked = check_weight(redact(key), weight)
        reward = _make(key, device, options.get(key, {}))
        name = _free_name(key if key in BUILT_IN else redact(reward.name), rewards)
        rewards[name], named[name] = reward, checked
    return WeightedSum(rewards, named)


def _make(key: str, device: str | torch.device, options: Mapping[str, Any]) -> Reward:
    if key in BUILT_IN:
        return _instance(key, _load(BUILT_IN[key]), device, options)
    if key.startswith(("http://", "https://")):
        return _instance(public_address(key), RemoteReward, device, {"url": key, **options})
    module, colon, attribute = key.partition(":")
    if colon and attribute and all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        return _instance(key, _load(key), device, options)
    module, dot, attribute = key.rpartition(".")
    dotted = dot and key.replace(".", "").isidentifier() and attribute != "py"
    hint = f"; did you mean {module}:{attribute}?" if dotted else suggestion(key, list(BUILT_IN))
    raise ValueError(
        f"unknown reward {redact(key)!r}: it must be one of {', '.join(BUILT_IN)}, a 'package.module:attribute', or an "
        f"http(s) URL{hint}"
    )


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = f"; did you mean {module.removesuffix('.py')}:{attribute}?" if module.endswith(".py") else ""
        raise ModuleNotFoundError(
            f"reward {path!r} cannot be imported: {error}. Its module must be installed, or lie in the current "
            f"directory ({os.getcwd()}) or on PYTHONPATH{hint}"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            hint = suggestion(name, [known for known in dir(found) if not known.startswith("_")])
            raise ValueError(f"module {module!r} has no attribute {attribute!r}{hint}")
        found = getattr(found, name)
    return found


def _instance(key: str, found: Any, device: str | torch.device, options: Mapping[str, Any]) -> Reward:
    if not isinstance(found, type) and _is_reward(found):
        if options:
            raise ValueError(f"options of {key!r} must be empty because it is an instance, got {redacted(options)!r}")
        return cast(Reward, found)
    if not callable(found):
        raise TypeError(f"{key!r} must be a reward, a class or a function, got {type(found).__name__}")
    if inspect.isfunction(found) and next(iter(inspect.signature(found).parameters), None) == "images":
        return FunctionReward(found, options)
    keywords = dict(options)
    try:
        signature = inspect.signature(found)
    except ValueError:  # some built-in callables have no signature
        return _made(key, found, keywords)
    if "device" in signature.parameters:
        keywords.setdefault("device", device)
    try:
        signature.bind(**keywords)
    except TypeError as error:
        shown = signature.replace(parameters=[_without_default(p) for p in signature.parameters.values()])
        name = getattr(found, "__name__", type(found).__name__)
        raise ValueError(f"options of {key!r} must fit {name}{shown}: {error}") from None
    return _made(key, found, keywords)


def _check_shape(name: str, values: object) -> None:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"{name} must be a mapping with string keys, got {type(values).__name__}")


def _without_default(parameter: inspect.Parameter) -> inspect.Parameter:
    hide = is_secret(parameter.name) and isinstance(parameter.default, str)
    return parameter.replace(default=HIDDEN) if hide else parameter


def _made(key: str, found: Any, keywords: dict[str, Any]) -> Reward:
    try:
        made = found(**keywords)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {key!r}: {error}") from error
    if not _is_reward(made):
        raise TypeError(f"{key!r} must return a reward (a callable with a name), got {type(made).__name__}")
    return cast(Reward, made)


def _is_reward(candidate: Any) -> bool:
    return callable(candidate) and isinstance(getattr(candidate, "name", None), str)


def _free_name(name: str, taken: Mapping[str, Reward]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free
