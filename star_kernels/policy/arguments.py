"""The arguments of the policy operators, each declared once: name, kind, order.

The schemas of the operators, their checks, the layouts that kernels require and the order in which the compiled
libraries read (csrc/binding.h) all follow these declarations. Tensors come first. Values are those of the public
functions after validation; ``channel_dim`` counts from the front.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from torch import Tensor


class Kind(Enum):
    """What an argument is."""

    LATENT = auto()  # the shape of model_output
    PER_SAMPLE = auto()  # float32 [B]
    ADVANTAGES = auto()  # float32 [B], [B, *locations] or, with the weights of phrases, [B, G]
    OLD_LOG_PROB = auto()  # float32 [B, *locations] or [B]
    COEFFICIENTS = auto()  # float32 [6, B] or [6, 1], see Transition
    WEIGHTS = auto()  # float32 [B, *grid]; for phrases [B, G, *grid]
    MASK = auto()  # bool [B, *locations]
    INTEGER = auto()
    FLAG = auto()
    NUMBER = auto()


Latent = Annotated[Tensor, Kind.LATENT]
PerSample = Annotated[Tensor, Kind.PER_SAMPLE]
Advantages = Annotated[Tensor, Kind.ADVANTAGES]
OldLogProb = Annotated[Tensor, Kind.OLD_LOG_PROB]
Coefficients = Annotated[Tensor, Kind.COEFFICIENTS]
Weights = Annotated[Tensor, Kind.WEIGHTS]
Mask = Annotated[Tensor, Kind.MASK]
Integer = Annotated[int, Kind.INTEGER]
Flag = Annotated[bool, Kind.FLAG]
Number = Annotated[float, Kind.NUMBER]


class PolicyArguments(NamedTuple):
    """Those of the clipped policy loss. With kl_mask_threshold the bounds of the ratio are 0 and infinity."""

    model_output: Latent
    sample: Latent
    prev_sample: Latent
    old_log_prob: OldLogProb
    advantages: Advantages
    coefficients: Coefficients
    weights: Weights | None
    mask: Mask | None
    step_weights: PerSample | None
    old_model_output: Latent | None
    ref_model_output: Latent | None
    channel_dim: Integer
    per_location: Flag
    weighted_kl: Flag
    unreduced: Flag
    clip_low: Number
    clip_high: Number
    advantage_clip: Number
    kl_coef: Number
    kl_mask_threshold: Number = 0.0  # none

    @property
    def has_phrases(self) -> bool:
        """Whether weights are ``[B, G, *grid]`` and advantages ``[B, G]``."""
        return has_phrases(self.weights, self.model_output)

    @property
    def phrases(self) -> int:
        """G, the number of phrases; 1 for other advantages."""
        return self.advantages.shape[1] if self.has_phrases else 1

    @property
    def dense(self) -> bool:
        """Whether advantages are ``[B, *locations]``."""
        return self.advantages.ndim > 1 and not self.has_phrases

    @property
    def guarded(self) -> bool:
        """Whether ratios are normalised as GRPO-Guard's."""
        return self.old_model_output is not None and self.kl_mask_threshold == 0

    @property
    def absent_metrics(self) -> tuple[str, ...]:
        """Metrics of the kernels that these arguments do not have."""
        return () if self.kl_mask_threshold else ("kl_new_old_mean",)

    @property
    def saved_rows(self) -> int:
        """Rows of the tensor [rows, B] saved for the backward pass.

        d loss / d log-ratio of each phrase, or for dense advantages of both signs; one over the number of locations.
        """
        if self.advantages.ndim == 1:
            return 2
        return 3 if self.dense else self.phrases + 1


class NftArguments(NamedTuple):
    """Those of DiffusionNFT's loss."""

    model_output: Latent
    old_model_output: Latent
    target: Latent
    advantages: PerSample
    sigma: PerSample
    weights: Weights | None
    mask: Mask | None
    step_weights: PerSample | None
    ref_model_output: Latent | None
    channel_dim: Integer
    adaptive: Flag
    weighted_kl: Flag
    unreduced: Flag
    beta: Number
    advantage_clip: Number
    kl_coef: Number

    @property
    def absent_metrics(self) -> tuple[str, ...]:
        """See PolicyArguments."""
        return ()

    @property
    def saved_rows(self) -> int:
        """Factors of ``old - target`` and of ``output - old`` in the gradient; one over the number of locations."""
        return 3


class SampleArguments(NamedTuple):
    """Those of the sampling step."""

    model_output: Latent
    sample: Latent
    noise: Latent
    coefficients: Coefficients
    channel_dim: Integer


Arguments = PolicyArguments | NftArguments | SampleArguments


class Forward(NamedTuple):
    """What the forward pass of an objective writes."""

    loss: Tensor  # float32, [] or, unreduced, [B]
    metrics: Tensor  # float32 [metrics]
    saved: Tensor  # float32 [rows, B], for the backward pass


class Backward(NamedTuple):
    """What the backward pass of an objective reads, and the gradient that it writes."""

    grad_loss: Tensor  # like the loss
    saved: Tensor
    gradient: Tensor  # with respect to model_output


def has_phrases(weights: Tensor | None, model_output: Tensor) -> bool:
    """Whether weights have one dimension more than the locations: that of the phrases."""
    return weights is not None and weights.ndim == model_output.ndim


class Declaration:
    """What follows from the fields of one of the classes above. Made once each, when the operators are defined."""

    def __init__(self, arguments: type[Any]) -> None:
        hints = get_type_hints(arguments, include_extras=True)
        self.kinds: dict[str, Kind] = {}
        self.optional: set[str] = set()
        self.schema = ", ".join(f"{self._type(name, hints[name])} {name}" for name in arguments._fields)
        tensors = [name for name, kind in self.kinds.items() if kind not in _SCALARS]
        self.n_tensors = len(tensors)
        self.n_arguments = len(self.kinds)
        self.is_latent = tuple(self.kinds[name] is Kind.LATENT for name in tensors)

    def _type(self, name: str, hint: Any) -> str:
        """The type in a schema, of ``Annotated[type, kind]`` or of that or None."""
        optional = type(None) in get_args(hint)
        annotated = get_args(hint)[0] if optional else hint
        self.kinds[name] = kind = annotated.__metadata__[0]
        if optional:
            self.optional.add(name)
        return _SCALARS.get(kind, "Tensor?" if optional else "Tensor")


_SCALARS = {Kind.INTEGER: "int", Kind.FLAG: "bool", Kind.NUMBER: "float"}
