"""Which replica a request goes to: one that holds the revision that it shall run on.

Serve makes one in every process that calls the Model: the gateway, a script with a handle. What the
replicas hold, and the share that a `dedicated` canary gets, reaches it with their routing stats
(`Model.record_routing_stats`), about a second late; so it only prefers. A replica answers with what
it holds then, and refuses what it does not hold: nobody gets a revision that he did not name.
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
from serve_app.wire.routing_stats import newest_traffic

logger = logging.getLogger(__name__)
STATS_PERIOD_S = 1.0
_UNDECIDED = 10_000  # requests that wait for a replica; more than a gateway lets in


class RevisionRouter(RequestRouter):  # type: ignore[misc]
    """The less loaded of two random replicas, among those with the right revision."""

    def initialize_state(self, *, model_name: str) -> None:
        self._model_name = model_name
        self._split = TrafficSplit(start=random.random())
        # once for each request, however often it is looked for a place
        self._to_canary: OrderedDict[str, bool] = OrderedDict()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        right = candidate_replicas
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # while all of them are full
            try:
                right = self._right(candidate_replicas, pending_request) or candidate_replicas
            except Exception:  # with which the request would wait for ever
                logger.exception("a request goes to any replica")
        return [random.sample(right, min(2, len(right)))]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,  # noqa: ARG002
        result: Any,  # noqa: ARG002
    ) -> None:
        self._to_canary.pop(pending_request.metadata.internal_request_id, None)

    def _right(
        self, replicas: Sequence[RunningReplica], pending: PendingRequest
    ) -> list[RunningReplica]:
        """Those that hold what the request runs on; none when nobody is known to."""
        pin, session = asked(pending.args, pending.kwargs, served=self._model_name)
        if pin is not None:
            return [
                r for r in replicas if any(Revision.parse(key).matches(pin) for key in _serves(r))
            ]
        now = newest_traffic(replicas)
        if now is None or now.placement == "shared":
            return []
        on_canary = self._decided(pending, now, session)
        return [r for r in replicas if _serves(r) and (_serves(r)[0] == now.canary) == on_canary]

    def _decided(self, pending: PendingRequest, now: Traffic, session: str | None) -> bool:
        id = pending.metadata.internal_request_id
        if id not in self._to_canary:
            self._to_canary[id] = self._split.to_canary(now, session)
            if len(self._to_canary) > _UNDECIDED:
                self._to_canary.popitem(last=False)
        return self._to_canary[id]


def asked(
    args: Sequence[Any], kwargs: Mapping[str, Any], *, served: str
) -> tuple[str | None, str | None]:
    """The revision and the session that a call of the Model names: (request, pin, session).

    Nothing is checked yet: what makes no sense here is refused by whichever replica gets it.
    """
    given = dict(zip(("request", "pin", "session"), args, strict=False)) | dict(kwargs)
    request = given.get("request")
    model, user = (_field(request, name) for name in ("model", "user"))
    try:
        pin = find_pin(model, given.get("pin"), served=served)
    except InvalidRequest:
        pin = None
    return pin, given.get("session") or user


def _field(request: Any, name: str) -> str | None:
    found = request.get(name) if isinstance(request, Mapping) else getattr(request, name, None)
    return found if isinstance(found, str) else None


def _serves(replica: RunningReplica) -> list[str]:
    """The default first; empty where it has said nothing yet."""
    return replica.routing_stats.get("serves", [])  # type: ignore[no-any-return]
