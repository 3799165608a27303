"""What a user asks for: the plan of a rollout.

First in the pipeline plan -> machine -> assignment. The plan never changes after it was accepted;
how far the rollout is lives in the machine's state.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Strategy = Literal["all_at_once", "rolling"]
InFlight = Literal["drain", "overlap"]


class Plan(BaseModel):
    """Move the fleet to one adapter.

    `all_at_once` commits on every replica as soon as all of them have staged the image. `rolling`
    commits in waves of at most `max_unavailable` replicas.

    `in_flight`: what happens to requests that run when their replica moves, there and back.
    `drain`: new ones wait until they are done. `overlap`: they finish on the revision that they
    began with, beside the new ones. None: overlap where the fleet can, else drain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    adapter: Annotated[
        str, Field(min_length=1, description="path, Hub id or URI; 'base' for no adapter")
    ]
    name: Annotated[
        str | None, Field(max_length=256, description="revision name; else taken from the source")
    ] = None
    strategy: Strategy = "rolling"
    max_unavailable: Annotated[
        int, Field(ge=1, description="replicas that may be out of service for the swap at once")
    ] = 1
    in_flight: InFlight | None = None
    progress_deadline_s: Annotated[
        float, Field(gt=0, le=86_400, description="abort when not finished after this many seconds")
    ] = 600.0
