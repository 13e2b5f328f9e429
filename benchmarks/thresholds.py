"""What ``--check`` holds the figures to: the one table of limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ANY = ""
# Names of cases; --quick has others.
ATTENTION, LARGE, FLUX = "SD3.5-M 512²", "SD3.5-M 1024²", "FLUX 1024²"
LOSS, BANDWIDTH = "policy loss", "policy loss, large"
FORWARD, STEP, EPOCH = "SD3.5-M 1024² forward", "SD3.5-M step", "epoch of the driver"


@dataclass(frozen=True)
class Threshold:
    """A limit on a ratio of a part's cases; ``device``, ``case`` and ``dtype`` narrow it down."""

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
    *(Threshold("backward", "backward_over_flash", "<=", 1.0, device="cuda", case=case) for case in (ATTENTION, LARGE)),
    Threshold("policy", "eager_over_ours", ">=", 10.0, device="cuda", case=LOSS),
    Threshold("policy", "compiled_over_ours", ">=", 2.0, device="cuda", case=LOSS),
    Threshold("policy", "copy_over_ours", ">=", 0.85, device="cuda", case=BANDWIDTH),
    Threshold("policy", "launches", "<=", 3, device="cuda", case=LOSS),
    Threshold("policy", "synchronisations", "<=", 0, device="cuda", case=LOSS),
    Threshold("attention", "overhead", "<=", 1.01, device="cpu", case=ATTENTION),
    Threshold("attention", "materialised_over_ours", ">=", 3.0, case=ATTENTION),
    Threshold("policy", "eager_over_ours", ">=", 4.0, device="cpu", case=LOSS),
    Threshold("policy", "eager_over_ours_weighted", ">=", 4.0, device="cpu", case=LOSS),
    Threshold("policy", "compiled_over_ours", ">", 1.0, case=LOSS),
    Threshold("policy", "compiled_over_ours_weighted", ">", 1.0, case=LOSS),
    # A gradient and the few numbers that come with it: loss, metrics, one slope a sample.
    Threshold("policy", "memory_over_gradient", "<=", 1.001, case=LOSS),
    Threshold("policy", "memory_over_gradient_weighted", "<=", 1.001, case=LOSS),
    Threshold("capture", "capture_over_plain", "<=", 1.015, device="cpu", case=FORWARD),
    Threshold("capture", "capture_memory", "<=", 1.01, case=FORWARD),
    Threshold("end-to-end", "star_over_plain", "<=", 1.02, case=STEP),
    Threshold("epoch", "star_over_plain", "<=", 1.01, device="cpu", case=EPOCH),
    Threshold("epoch", "star_by_parts", "<=", 1.01, device="cpu", case=EPOCH),
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
    passed: bool
    calm: bool  # false: other programs took the processor meanwhile, so the verdict may be theirs

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        value = "not measured"
        if self.measured is not None:
            value = f"{self.measured:.4g}"
            if self.low is not None and self.high is not None:
                value += f" [{self.low:.4g}, {self.high:.4g}]"
            if not self.calm:
                value += " busy"
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.case:<33} {self.ratio:<29} {self.limit:<8} {value}"


def evaluate(parts: dict[str, list[dict[str, Any]]], device: str) -> list[Outcome]:
    """Every threshold against every case that it is about; a ratio that could not be measured fails."""
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
    measured = figure.get("median")
    passed = (
        measured is not None
        and {
            "<=": measured <= threshold.limit,
            ">=": measured >= threshold.limit,
            ">": measured > threshold.limit,
        }[threshold.sense]
    )
    batch = f"batch {case['batch']}" if case.get("batch") else ""
    name = " ".join(filter(None, (case["name"], batch, case["dtype"])))
    limit = f"{threshold.sense} {threshold.limit:g}"
    return Outcome(
        threshold.part,
        name,
        threshold.ratio,
        limit,
        measured,
        figure.get("low"),
        figure.get("high"),
        passed,
        figure.get("calm", True),
    )
