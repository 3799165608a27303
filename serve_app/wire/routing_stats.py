"""Routing statistics: the part of a replica's state that Serve passes on to every router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from ray.serve.request_router import RunningReplica

from serve_app.rollout.state import Traffic

_TRAFFIC = TypeAdapter(Traffic | None)


def routing_stats(
    *, epoch: int, generation: int, serves: Sequence[str], traffic: Traffic | None
) -> dict[str, Any]:
    """The routing statistics of one replica, for every request router."""
    return {
        "decision": [epoch, generation],
        "serves": list(serves),
        "traffic": _TRAFFIC.dump_python(traffic, mode="json"),
    }


def newest_traffic(replicas: Sequence[RunningReplica]) -> Traffic | None:
    """The traffic split of the newest decision among the replicas."""
    said = [replica.routing_stats for replica in replicas if "decision" in replica.routing_stats]
    if not said:
        return None
    return _TRAFFIC.validate_python(max(said, key=lambda each: each["decision"])["traffic"])
