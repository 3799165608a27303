"""The analysis of a canary: the part of a plan that defines it, and its verdicts.

The analysis itself needs numbers of a live fleet and is done in `serve_app.controller.analysis`.
The machine receives its verdicts as events.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.rollout.duration import Duration

Metric = Literal["error_rate", "latency", "time_to_first_token", "tokens_per_second"]
NoData = Literal["inconclusive", "pass", "fail"]
_FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class Outcome(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Limits(_Part):
    """Inclusive limits: a value that equals one of them is within."""

    min: float | None = None
    max: float | None = None

    def __contains__(self, value: float) -> bool:
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    @property
    def given(self) -> bool:
        return self.min is not None or self.max is not None

    def __str__(self) -> str:
        ends = (("at least", self.min), ("at most", self.max))
        return " and ".join(f"{word} {end:g}" for word, end in ends if end is not None)


class Comparison(_Part):
    """The canary against stable, over the same time: a one-sided Mann-Whitney test.

    It fails the canary when the difference is significant (p below `alpha`) and large (a request on
    the canary is worse than one on stable with a probability of `effect` or more; 0.5 is no
    difference). `alpha` is small, because a step is tested many times.
    """

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    effect: Annotated[float, Field(gt=0.5, le=1)] = 0.65


class Check(Limits):
    """One figure of the requests that the canary answered in this step.

    `latency` and `time_to_first_token` are in seconds, `tokens_per_second` is of a single request,
    `error_rate` is a share from 0 to 1. The limits apply to the `quantile`.
    """

    metric: Metric
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    versus_stable: Comparison | None = None

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if not self.given and self.versus_stable is None:
            raise ValueError(f"{self.metric} needs a min, a max or versus_stable")
        if self.metric == "error_rate" and self.quantile is not None:
            raise ValueError("error_rate is one number and has no quantile")
        return self

    @property
    def of(self) -> float | None:
        """The quantile, or its default: 0.95; 0.5 for tokens per second; none for an error rate."""
        if self.metric == "error_rate" or self.quantile is not None:
            return self.quantile
        return 0.5 if self.metric == "tokens_per_second" else 0.95


class Probe(_Part):
    """A Python function, run as a Ray task: `def probe(canary, stable, **options) -> scores`.

    `canary` and `stable` are clients pinned to the two revisions (`serve_app.probes.Client`). It
    returns a dict of numbers; each score that `scores` names has to be within its limits.
    """

    function: Annotated[str, Field(pattern=_FUNCTION, description="package.module:function")]
    scores: Annotated[dict[str, Limits], Field(min_length=1)]
    options: dict[str, str | int | float | bool] = {}
    timeout: Annotated[Duration, Field(gt=0, le=86_400)] = 60.0

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        for name, limits in self.scores.items():
            if not limits.given:
                raise ValueError(f"the score {name!r} needs a min or a max")
        return self


class Query(Limits):
    """A Prometheus query that gives one number.

    `{canary}` and `{stable}` in it become the two revisions as metrics name them.
    """

    address: Annotated[str, Field(pattern=r"^https?://", description="of the Prometheus server")]
    query: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if not self.given:
            raise ValueError("a query needs a min or a max")
        return self


class Analysis(_Part):
    """The analysis of every step. All parts have to pass; the first failure fails the step.

    `min_samples`: fewer requests than this, of either revision, are no data. `no_data`: the outcome
    of a check without data. Inconclusive: the step goes on until there is data, or until the
    plan's `progress_deadline` is over.
    """

    checks: tuple[Check, ...] = ()
    probes: tuple[Probe, ...] = ()
    queries: tuple[Query, ...] = ()
    interval: Annotated[Duration, Field(ge=0.05, le=3600)] = 1.0
    min_samples: Annotated[int, Field(ge=1, le=1000)] = 30
    no_data: NoData = "inconclusive"

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if not (self.checks or self.probes or self.queries):
            raise ValueError("an analysis needs at least one check, probe or query")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The outcome of one check, probe score or query. `why` is a sentence with its numbers."""

    name: str
    outcome: Outcome
    why: str
    canary: float | None = None
    stable: float | None = None
    canary_samples: int | None = None
    stable_samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a step.

    Attributes:
        step: index in the plan's steps.
        weight: percent of the requests that the canary was to get.
        share: percent that it got, of the `requests` that named no revision.
        at: seconds since the epoch.
    """

    step: int
    weight: float
    outcome: Outcome
    at: float
    measurements: tuple[Measurement, ...] = ()
    share: float | None = None
    requests: int = 0

    @property
    def why(self) -> str:
        """The sentences of the measurements that have the verdict's outcome."""
        return "; ".join(each.why for each in self.measurements if each.outcome is self.outcome)
