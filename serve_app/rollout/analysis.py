"""What a canary is judged by: the part of a plan that says so, and the verdicts that come of it.

Beside `plan`. The judging itself needs numbers that only a live fleet has and is done elsewhere
(`serve_app.controller.verdicts`); the machine takes its verdicts as events.
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
    """Both are still good."""

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

    It fails the canary when being worse is significant (p below `alpha`) and matters (a request on
    the canary is worse than one on stable with a probability of `effect` or more; 0.5 is no
    difference). A step is looked at many times, so `alpha` is small.
    """

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    effect: Annotated[float, Field(gt=0.5, le=1)] = 0.65


class Check(Limits):
    """One figure of the requests that the canary answered in this step.

    `latency` and `time_to_first_token` are in seconds, `tokens_per_second` is of a single request,
    `error_rate` is a share from 0 to 1. `quantile`: which one of them the limits are for.
    """

    metric: Metric
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    versus_stable: Comparison | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.given and self.versus_stable is None:
            raise ValueError(f"{self.metric} needs a min, a max or versus_stable to be judged by")
        if self.metric == "error_rate" and self.quantile is not None:
            raise ValueError("error_rate is one number and has no quantile")
        return self

    @property
    def of(self) -> float | None:
        """The quantile, or the usual one: 0.95, or the median of what is better when larger."""
        if self.metric == "error_rate" or self.quantile is not None:
            return self.quantile
        return 0.5 if self.metric == "tokens_per_second" else 0.95


class Probe(_Part):
    """A Python function, run as a Ray task: `def probe(canary, stable, **options) -> scores`.

    `canary` and `stable` are clients pinned to the two revisions (`serve_app.probes.Client`). It
    returns a number for each score; those that `scores` names have to be within their limits.
    """

    function: Annotated[str, Field(pattern=_FUNCTION, description="package.module:function")]
    scores: Annotated[dict[str, Limits], Field(min_length=1)]
    options: dict[str, str | int | float | bool] = {}
    timeout: Annotated[Duration, Field(gt=0, le=86_400)] = 60.0

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        for name, limits in self.scores.items():
            if not limits.given:
                raise ValueError(f"the score {name!r} needs a min or a max to be judged by")
        return self


class Query(Limits):
    """A Prometheus query that gives one number.

    `{canary}` and `{stable}` in it become the two revisions as metrics name them.
    """

    address: Annotated[str, Field(pattern=r"^https?://", description="of the Prometheus server")]
    query: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.given:
            raise ValueError("a query needs a min or a max to be judged by")
        return self


class Analysis(_Part):
    """All of it has to pass before a step is left; one failure is enough to fail it.

    `min_samples`: fewer requests than this, on either side of what is compared, are no data.
    `no_data`: what a check without data comes to. Inconclusive: the step goes on until there is
    data, or until the plan's `progress_deadline` is over.
    """

    checks: tuple[Check, ...] = ()
    probes: tuple[Probe, ...] = ()
    queries: tuple[Query, ...] = ()
    interval: Annotated[Duration, Field(ge=0.05, le=3600)] = 1.0
    min_samples: Annotated[int, Field(ge=1, le=1000)] = 30
    no_data: NoData = "inconclusive"

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.checks or self.probes or self.queries):
            raise ValueError("an analysis needs at least one check, probe or query")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One thing that was looked at. `why` is a sentence with its numbers."""

    name: str
    outcome: Outcome
    why: str
    canary: float | None = None
    stable: float | None = None
    canary_samples: int | None = None
    stable_samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a step came to. `share`: of the requests that named no revision, in percent."""

    step: int
    weight: float
    outcome: Outcome
    at: float
    measurements: tuple[Measurement, ...] = ()
    share: float | None = None
    requests: int = 0

    @property
    def why(self) -> str:
        """Those measurements that made it what it is."""
        return "; ".join(each.why for each in self.measurements if each.outcome is self.outcome)
