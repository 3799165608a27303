"""Routing statistics: data that each replica publishes to all request routers, through Serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from pydantic import TypeAdapter

from serve_app.rollout.state import Traffic

_TRAFFIC = TypeAdapter(Traffic)


class RoutingStats(TypedDict):
    """The statistics of one replica, as JSON values; `{}` until it has published them.

    `decision`: epoch and generation of the controller's decision that the replica follows.
    `serves`: the keys of the revisions that it runs requests on, the default first.
    `traffic`: the canary's share of the requests in that decision, for `parse_traffic`.
    """

    decision: list[int]
    serves: list[str]
    traffic: dict[str, Any] | None


def routing_stats(
    *, epoch: int, generation: int, serves: Sequence[str], traffic: Traffic | None
) -> RoutingStats:
    return {
        "decision": [epoch, generation],
        "serves": list(serves),
        "traffic": None if traffic is None else _TRAFFIC.dump_python(traffic, mode="json"),
    }


def parse_traffic(document: dict[str, Any]) -> Traffic:
    """Raises `pydantic.ValidationError` for the format of another version."""
    return _TRAFFIC.validate_python(document)
