"""The control lane: what a replica tells the controller, and what it hears back.

`report(Report) -> Answer` is the only call that a replica makes in normal life. It stays open while
nothing changes, so it is the broadcast, the heartbeat and the acknowledgement at once. Both sides
send whole documents: a message that got lost is repaired by the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

from hotswap_lib import HotswapError
from serve_app.rollout.state import Desired, ReplicaState
from serve_app.wire.admin import LaneView, StartView, SwapView
from serve_app.wire.request_stats import RequestStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The state of a replica, and the document that it acts on.

    Attributes:
        layout: the fingerprint of its layout; images are packed for a layout.
        acting_on: the newest document that it has accepted.
        running: requests in generation.
        admits: it lets requests in, maybe still on the revision that it held before.
        request_stats: of the requests of the canary step `step_id`, by revision.
    """

    replica: str
    layout: str
    acting_on: Desired | None
    state: ReplicaState
    running: int
    recompiles: int
    limit_hits: int
    last_swap: SwapView | None
    pid: int
    node: str
    admits: bool = False
    lanes: tuple[LaneView, ...] = ()
    start: StartView | None = None
    step_id: str | None = None
    request_stats: dict[str, RequestStats] = field(default_factory=dict)


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
