"""The limits that ``--check`` compares the results with.

The limits for CPUs apply to every CPU. Attention is faster on a processor with matrix instructions (AMX), so the same
maps have an overhead of 1.7 % there and 0.6 % on others. The limits for GPUs are goals.
"""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from typing import Any

ANY = ""
# Names of the cases. Cases of --quick have other names, to which no threshold applies.
ATTENTION, LARGE, FLUX, FLUX_512 = "SD3.5-M 512²", "SD3.5-M 1024²", "FLUX 1024²", "FLUX 512²"
LOSS, BANDWIDTH = "policy loss", "policy loss, large"
FORWARD, STEP, EPOCH = ("SD3.5-M 512² forward", "SD3.5-M 1024² forward"), "SD3.5-M step", "epoch of the driver"
HOST, HOST_BETWEEN_OTHERS = "host time", "host time between other calls"  # limits apply to the first
# Attention: above SDPA.
MICROSECONDS = {
    "attention_us": 25.0,
    "attention_gradients_us": 45.0,
    "policy_loss_us": 100.0,
    "flow_sde_us": 40.0,
    "allocate_us": 30.0,
}
EAGER = ("eager_over_ours", "eager_over_ours_weighted")
COMPILED = ("compiled_over_ours", "compiled_over_ours_weighted")
HELD, FAILED, UNDECIDED = "held", "FAILED", "undecided"


@dataclass(frozen=True)
class Threshold:
    """A limit on a ratio in the cases of a part; ``device``, ``case`` and ``dtype`` select the cases."""

    part: str
    ratio: str
    sense: str  # "<=", ">=" or ">"
    limit: float
    device: str = ANY
    case: str = ANY
    dtype: str = ANY


THRESHOLDS = (
    *(
        Threshold("attention", "overhead", "<=", 1.005, device="cuda", case=case, dtype="bfloat16")
        for case in (ATTENTION, LARGE)
    ),
    *(
        Threshold("attention", "distance_to_floor", "<=", limit, device="cuda", case=case, dtype="bfloat16")
        for case, limit in ((ATTENTION, 1.0), (LARGE, 1.0), (FLUX, 1.01))
    ),
    *(
        Threshold("backward", "detached_over_sdpa", "<=", limit, device=device, case=case)
        for device, limit, cases in (("cuda", 1.01, (ATTENTION, LARGE, FLUX)), ("cpu", 1.03, (ATTENTION, FLUX_512)))
        for case in cases
    ),
    *(Threshold("backward", "backward_over_flash", "<=", 1.0, device="cuda", case=case) for case in (ATTENTION, LARGE)),
    Threshold("policy", "eager_over_ours", ">=", 10.0, device="cuda", case=LOSS),
    Threshold("policy", "compiled_over_ours", ">=", 2.0, device="cuda", case=LOSS),
    Threshold("policy", "copy_over_ours", ">=", 0.85, device="cuda", case=BANDWIDTH),
    Threshold("policy", "launches", "<=", 3, device="cuda", case=LOSS),
    Threshold("policy", "synchronisations", "<=", 0, device="cuda", case=LOSS),
    Threshold("attention", "materialised_over_ours", ">=", 3.0, device="cuda", case=ATTENTION),
    *(Threshold("policy", ratio, ">", 1.0, device="cuda", case=LOSS) for ratio in COMPILED),
    *(Threshold("capture", "capture_over_plain", "<=", 1.005, device="cuda", case=case) for case in FORWARD),
    Threshold("end-to-end", "star_over_plain", "<=", 1.005, device="cuda", case=STEP),
    *(
        Threshold("compiled", f"{mode}_capture_over_plain", "<=", 1.005, device="cuda", case=case)
        for case in FORWARD
        for mode in ("compiled", "graphs")
    ),
    Threshold("compiled", "compiled_star_over_plain", "<=", 1.005, device="cuda", case=STEP),
    *(Threshold("attention", "overhead", "<=", 1.03, device="cpu", case=case) for case in (ATTENTION, LARGE)),
    Threshold("attention", "materialised_over_ours", ">=", 2.0, device="cpu", case=ATTENTION),
    *(Threshold("policy", ratio, ">=", 2.0, device="cpu", case=LOSS) for ratio in EAGER),
    *(Threshold("policy", ratio, ">", 1.0, device="cpu", case=LOSS) for ratio in COMPILED),
    *(Threshold("capture", "capture_over_plain", "<=", 1.03, device="cpu", case=case) for case in FORWARD),
    *(Threshold("host", ratio, "<=", limit, device="cpu", case=HOST) for ratio, limit in MICROSECONDS.items()),
    Threshold("end-to-end", "star_over_plain", "<=", 1.03, device="cpu", case=STEP),
    Threshold("epoch", "star_over_plain", "<=", 1.03, device="cpu", case=EPOCH),
    Threshold("epoch", "star_by_parts", "<=", 1.02, device="cpu", case=EPOCH),
    # One gradient plus a few numbers: the loss, the metrics and one derivative per sample.
    Threshold("policy", "memory_over_gradient", "<=", 1.001, case=LOSS),
    Threshold("policy", "memory_over_gradient_weighted", "<=", 1.001, case=LOSS),
    *(Threshold("capture", "capture_memory", "<=", 1.01, case=case) for case in FORWARD),
    Threshold("epoch", "star_memory", "<=", 1.01, case=EPOCH),
)


@dataclass(frozen=True)
class Outcome:
    part: str
    case: str
    ratio: str
    limit: str
    measured: float | None
    low: float | None  # the 95 % interval of the measured median
    high: float | None
    verdict: str  # HELD or FAILED if the whole interval is on one side of the limit
    calm: bool  # False: other programs used the processor, and the verdict may be due to them

    @property
    def passed(self) -> bool:
        return self.verdict == HELD

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        value = "not measured"
        if self.measured is not None:
            value = f"{self.measured:.4g}"
            if self.low is not None and self.high is not None:
                value += f" [{self.low:.4g}, {self.high:.4g}]"
            if not self.calm:
                value += " busy"
        return f"{self.verdict:<9} {self.case:<31} {self.ratio:<29} {self.limit:<8} {value}"


def evaluate(parts: dict[str, list[dict[str, Any]]], device: str) -> list[Outcome]:
    """Compares every threshold with every case that it selects. A ratio that is missing makes it UNDECIDED."""
    outcomes = []
    for threshold in THRESHOLDS:
        if threshold.device not in (ANY, device):
            continue
        for case in parts.get(threshold.part, []):
            if threshold.case in (ANY, case["name"]) and threshold.dtype in (ANY, case["dtype"]):
                outcomes.append(_judge(threshold, case))
    return outcomes


def _judge(threshold: Threshold, case: dict[str, Any]) -> Outcome:
    figure = case["ratios"].get(threshold.ratio, {})
    batch = f"batch {case['batch']}" if case.get("batch") else ""
    name = " ".join(filter(None, (case["name"], batch, case["dtype"])))
    return Outcome(
        threshold.part,
        name,
        threshold.ratio,
        f"{threshold.sense} {threshold.limit:g}",
        figure.get("median"),
        figure.get("low"),
        figure.get("high"),
        _verdict(threshold, figure),
        figure.get("calm", True),
    )


def _verdict(threshold: Threshold, figure: dict[str, Any]) -> str:
    """Decides by the whole interval; for numbers that are counted, such as bytes and launches, by the value."""
    if "median" not in figure or ("count" in figure and "low" not in figure):
        return UNDECIDED
    holds = [_HOLDS[threshold.sense](figure.get(end, figure["median"]), threshold.limit) for end in ("low", "high")]
    return HELD if all(holds) else UNDECIDED if any(holds) else FAILED


_HOLDS = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}
