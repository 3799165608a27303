"""The control lane: reports of replicas, and the controller's answers.

`report(Report) -> Answer` is a long poll, and the only call that a replica makes in normal
operation. It is broadcast, heartbeat and acknowledgement at once. Both sides send whole documents,
so that the next message repairs a lost one.
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
    """The desired document, if it has changed.

    Attributes:
        images: revision → its image in Ray's object store.
        refused: revision → the reason why it has no image.
        introduce: the controller does not know the replica's layout: call `join`, report again.
    """

    desired: Desired | None = None
    images: dict[str, ray.ObjectRef] = field(default_factory=dict)
    refused: dict[str, HotswapError] = field(default_factory=dict)
    introduce: bool = False
