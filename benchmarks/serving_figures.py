"""Figures of the serving benchmarks, their bars, and the statistics behind them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.load import Sample

Verdict = Literal["held", "missed", "reported"]
Windows = Sequence[tuple[float, float]]
"""Swaps: (began_at, ended_at), seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured value. `detail`: the values behind it, for the JSON. `says`: a remark."""

    name: str
    value: float
    unit: str = ""
    bar: str | None = None
    says: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    fails: bool = False  # missing this bar is an error, not a slow machine

    @property
    def verdict(self) -> Verdict:
        return "reported" if self.bar is None else verdict(self.bar, self.value)


def verdict(bar: str, value: float) -> Verdict:
    """`bar` is a sign and a number, such as "≥ 0.9"."""
    sign, limit = bar.split()
    held = value >= float(limit) if sign == "≥" else value <= float(limit)
    return "held" if held else "missed"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; nan without values."""
    if not values:
        return float("nan")
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(int(rank), 1) - 1]


def paired(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def split(samples: Sequence[Sample], windows: Windows) -> tuple[list[Sample], list[Sample]]:
    """The requests that ran during a swap at any time, and the others."""
    during = [s for s in samples if _met(s.due_at, s.ended_at, windows)]
    met = {id(s) for s in during}
    return during, [s for s in samples if id(s) not in met]


def split_by_arrival(
    samples: Sequence[Sample], windows: Windows
) -> tuple[list[Sample], list[Sample]]:
    """The same, but by the planned time of a request alone.

    A slow request is more likely to meet a swap. Here every request counts as if it had taken the
    median time.
    """
    usual_s = percentile([s.latency_s for s in samples], 50)
    during = [s for s in samples if _met(s.due_at, s.due_at + usual_s, windows)]
    met = {id(s) for s in during}
    return during, [s for s in samples if id(s) not in met]


def _met(began_at: float, ended_at: float, windows: Windows) -> bool:
    return any(began_at < end and ended_at > begin for begin, end in windows)


def latencies(samples: Sequence[Sample]) -> dict[str, float]:
    """p50, p99 and maximum of latency and of time to first token, in seconds."""
    whole = [s.latency_s for s in samples]
    first = [s.first_token_s for s in samples]
    at = {"p50": 50.0, "p99": 99.0, "max": 100.0}
    return {
        "requests": len(samples),
        **{f"latency_{name}_s": round(percentile(whole, p), 4) for name, p in at.items()},
        **{f"first_token_{name}_s": round(percentile(first, p), 4) for name, p in at.items()},
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "lowest": round(min(values), 4),
        "highest": round(max(values), 4),
        "rounds": len(values),
    }
