"""The request router: sends each request to a replica that serves its revision.

Serve runs one router in every process that calls the Model: the gateway, and each script with a
handle. It reads what the replicas serve, and the share of a `dedicated` canary, from their routing
statistics (`serve_app.wire.routing_stats`), which are up to `STATS_PERIOD_S` old. Therefore the
router only prefers replicas. The replica that gets a request checks its revision again, and refuses
one that it does not serve: a pinned request never runs on another revision.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from hotswap_lib import Revision
from serve_app.openai.model_name import find_pin
from serve_app.rollout.state import Traffic
from serve_app.rollout.traffic_split import TrafficSplit
from serve_app.wire.errors import InvalidRequest
from serve_app.wire.ray_internals import back_off_when_full, call_arguments, request_id
from serve_app.wire.routing_stats import RoutingStats, parse_traffic

logger = logging.getLogger(__name__)
STATS_PERIOD_S = 1.0
_MAX_UNPLACED = 10_000  # requests without a replica yet; more than a gateway admits


class RevisionRouter(RequestRouter):  # type: ignore[misc]
    """Offers Serve two random replicas with the right revision; Serve takes the less loaded one."""

    def initialize_state(self, *, model_name: str) -> None:
        self._model_name = model_name
        self._split = TrafficSplit(start=random.random())
        # decided once for each request, although Serve may ask several times to place it
        self._to_canary: OrderedDict[str, bool] = OrderedDict()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        preferred = candidate_replicas
        if pending_request is not None:
            back_off_when_full(pending_request)
            try:
                preferred = self._preferred(candidate_replicas, pending_request)
            except Exception:  # Serve would never place the request
                logger.exception("the routing failed: the request goes to any replica")
        preferred = preferred or candidate_replicas
        return [random.sample(preferred, min(2, len(preferred)))]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,  # noqa: ARG002
        result: Any,  # noqa: ARG002
    ) -> None:
        self._to_canary.pop(request_id(pending_request), None)

    def _preferred(
        self, replicas: Sequence[RunningReplica], pending: PendingRequest
    ) -> list[RunningReplica]:
        """Returns the replicas that serve the request's revision; empty if none is known to."""
        args, kwargs = call_arguments(pending)
        pin, session = pin_and_session(args, kwargs, served=self._model_name)
        if pin is not None:
            return [
                replica
                for replica in replicas
                if any(Revision.parse(key).matches(pin) for key in _serves(replica))
            ]
        traffic = _newest_traffic(replicas)
        if traffic is None or traffic.placement == "shared":
            return []  # the replica itself chooses between its revisions
        on_canary = self._is_for_canary(request_id(pending), traffic, session)
        return [
            replica
            for replica in replicas
            if (serves := _serves(replica)) and (serves[0] == traffic.canary) == on_canary
        ]

    def _is_for_canary(self, id: str, traffic: Traffic, session: str | None) -> bool:
        if id not in self._to_canary:
            self._to_canary[id] = self._split.to_canary(traffic, session)
            if len(self._to_canary) > _MAX_UNPLACED:
                self._to_canary.popitem(last=False)
        return self._to_canary[id]


def pin_and_session(
    args: Sequence[Any], kwargs: Mapping[str, Any], *, served: str
) -> tuple[str | None, str | None]:
    """Returns the revision and the session that a call of the Model names.

    The call has the parameters (request, pin, session). Its arguments are not checked here: the
    replica that gets the call refuses what is invalid.
    """
    given = dict(zip(("request", "pin", "session"), args, strict=False)) | dict(kwargs)
    request = given.get("request")
    model, user = (_text_field(request, name) for name in ("model", "user"))
    try:
        pin = find_pin(model, given.get("pin"), served=served)
    except InvalidRequest:
        pin = None
    return pin, given.get("session") or user


def _text_field(request: Any, name: str) -> str | None:
    found = request.get(name) if isinstance(request, Mapping) else getattr(request, name, None)
    return found if isinstance(found, str) else None


def _newest_traffic(replicas: Sequence[RunningReplica]) -> Traffic | None:
    """Returns the canary's share of the requests in the newest decision that a replica follows."""
    published: list[RoutingStats] = [r.routing_stats for r in replicas if r.routing_stats]
    newest = max(published, key=lambda stats: stats["decision"], default=None)
    if newest is None or newest["traffic"] is None:
        return None
    return parse_traffic(newest["traffic"])


def _serves(replica: RunningReplica) -> list[str]:
    """Returns the keys of the revisions that a replica serves, the default first; maybe none."""
    stats: RoutingStats = replica.routing_stats
    return stats.get("serves", [])
