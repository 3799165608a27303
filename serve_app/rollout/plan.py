"""The plan of a rollout: everything that a user can choose.

First in the pipeline plan -> machine -> assignment. A plan never changes after it was accepted; the
progress of the rollout is in `state.Rollout`. `python -m serve_app.rollout.plan` prints its JSON
schema.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from serve_app.rollout.analysis import Analysis
from serve_app.rollout.duration import Duration

Strategy = Literal["all_at_once", "rolling", "canary"]
Placement = Literal["dedicated", "shared"]
InFlight = Literal["drain", "overlap"]
OnFailure = Literal["rollback", "pause"]
DAY_S = 86_400.0


# discriminated, so that an error about one kind is not reported for the other kind too
Hold = Annotated[
    Annotated[Duration, Field(ge=0, le=30 * DAY_S), Tag("time")]
    | Annotated[Literal["manual"], Tag("manual")],
    Discriminator(lambda given: "manual" if given == "manual" else "time"),
]


class CanaryStep(BaseModel):
    """One step of a canary: this share of the requests, for this long at least.

    `hold`: counted from when every replica carries the step. 'manual': until a user promotes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Annotated[float, Field(gt=0, le=100, description="percent of the requests")]
    hold: Hold = 0.0

    @property
    def hold_s(self) -> float:
        return 0.0 if self.hold == "manual" else self.hold


Step = CanaryStep  # its former name, in users' scripts


class Plan(BaseModel):
    """Move the fleet to one adapter.

    `strategy`: `all_at_once` commits on every replica as soon as all of them have staged the image.
    `rolling` commits in waves of at most `max_unavailable` replicas. `canary` first gives the
    adapter a share of the requests, `steps` by step, and then goes on like `rolling`.

    `placement` of a canary: `shared`, every replica holds both revisions and takes the share of its
    own requests, so that one replica is enough; `dedicated`, some replicas hold the canary alone,
    and requests are routed to them. None: shared where the fleet can, else dedicated.

    `in_flight`: what happens to running requests when their replica moves, there and back. `drain`:
    new ones wait until they are done. `overlap`: they finish on the revision that they began with,
    while new ones already run on the other. None: overlap where the fleet can, else drain.

    `analysis`: the checks that each step of a canary has to pass. `on_failure`: what follows when a
    replica fails, a verdict fails or the deadline passes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    adapter: Annotated[
        str, Field(min_length=1, description="path, Hub id or URI; 'base' for no adapter")
    ]
    name: Annotated[
        str | None, Field(max_length=256, description="revision name; else taken from the source")
    ] = None
    strategy: Strategy = "rolling"
    steps: Annotated[tuple[CanaryStep, ...], Field(max_length=100)] = ()
    placement: Placement | None = None
    analysis: Analysis | None = None
    max_unavailable: Annotated[
        int, Field(ge=1, description="replicas that may be out of service for the swap at once")
    ] = 1
    in_flight: InFlight | None = None
    progress_deadline: Annotated[
        Duration,
        Field(
            gt=0,
            le=30 * DAY_S,
            description="it fails without progress for this long, holds not counted",
        ),
    ] = 600.0
    on_failure: OnFailure = "rollback"
    history_limit: Annotated[
        int, Field(ge=1, le=1000, description="earlier rollouts and revisions that are kept")
    ] = 20

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        if self.strategy != "canary":
            for field in ("steps", "placement", "analysis"):
                if getattr(self, field):
                    raise ValueError(f"{field} is for strategy 'canary', not {self.strategy!r}")
            return self
        if not self.steps:
            raise ValueError("a canary needs steps, such as [{'weight': 10, 'hold': '1m'}]")
        for before, after in pairwise(self.steps):
            if after.weight <= before.weight:
                raise ValueError(
                    f"the weights of the steps have to grow: {after.weight:g} % comes after "
                    f"{before.weight:g} %"
                )
        return self


if __name__ == "__main__":
    print(json.dumps(Plan.model_json_schema(), indent=2))
