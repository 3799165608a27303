"""The control lane: what a replica tells the controller, and what it hears back.

`report(Report) -> Answer` is the only call that a replica makes in normal life. It stays open while
nothing changes, so it is the broadcast, the heartbeat and the acknowledgement at once. Both sides
send whole documents: a message that got lost is repaired by the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

from hotswap_lib import HotswapError, Revision
from serve_app.rollout.state import Desired, Failure
from serve_app.wire.admin import LaneView, StartView, SwapView
from serve_app.wire.request_stats import RequestStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a replica holds, and which document it acts on.

    `holds`: for requests that name no revision; `also_serves`: for those that name one, and `refused`
    what it could not bring there. `serving`: it holds what it shall, and lets requests in.
    `admits`: it lets requests in, maybe still on what it held before. `tallies`: what became of the
    requests of `step_id`, by revision.
    """

    replica: str
    layout: str  # fingerprint; images are packed for a layout
    acting_on: Desired | None
    holds: Revision
    staged: Revision | None
    serving: bool
    failure: Failure | None
    running: int
    recompiles: int
    limit_hits: int
    last_swap: SwapView | None
    pid: int
    node: str
    also_serves: tuple[Revision, ...] = ()
    refused: tuple[Failure, ...] = ()
    admits: bool = False
    lanes: tuple[LaneView, ...] = ()
    start: StartView | None = None
    step_id: str | None = None
    request_stats: dict[str, RequestStats] = field(default_factory=dict)

    @property
    def serves(self) -> tuple[Revision, ...]:
        """What it answers with: `holds` first, then those beside it."""
        return self.holds, *self.also_serves


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The desired document, with the image of every revision it names, or why there is none.

    `introduce`: the controller does not know the replica's layout; send it with `join`, then report
    again. Neither: nothing has changed, report again.
    """

    desired: Desired | None = None
    images: dict[str, ray.ObjectRef] = field(default_factory=dict)
    refused: dict[str, HotswapError] = field(default_factory=dict)
    introduce: bool = False
