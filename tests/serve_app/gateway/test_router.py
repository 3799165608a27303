"""Which replica a request goes to, with stand-ins for Ray's replicas and requests.

What Ray promises about them is asked for at the end, each with a sentence for whoever upgrades Ray.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray import serve
from ray.serve import request_router
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from hotswap_lib import Revision
from serve_app.gateway import router
from serve_app.gateway.router import RevisionRouter, asked
from serve_app.openai.requests import ChatRequest, CompletionRequest
from serve_app.rollout.state import Traffic
from serve_app.rollout.traffic_split import session_position
from serve_app.wire.routing_stats import newest_traffic, routing_stats

ALPHA = Revision("alpha", "1234abcd" * 8).key
BETA = Revision("beta", "5678abcd" * 8).key
GAMMA = Revision("gamma", "9abc1234" * 8).key
SERVED = "tiny"


@dataclass
class Replica:
    """As much of a `RunningReplica` as is looked at."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict)


def replica(name: str, *serves: str, decision: int = 1, traffic: Traffic | None = None) -> Replica:
    return Replica(
        name, routing_stats(epoch=1, generation=decision, serves=serves, traffic=traffic)
    )


def traffic(weight: float, placement: Any = "dedicated") -> Traffic:
    return Traffic(canary=BETA, weight=weight, placement=placement, step_id="r1.1.1")


def pending(*args: Any, id: str = "one", **kwargs: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id=id, internal_request_id=id)
    return PendingRequest(args=list(args), kwargs=kwargs, metadata=metadata)


class Routed:
    """A router in this process, and the names of the replicas that it chooses from."""

    def __init__(self) -> None:
        self.router = RevisionRouter(DeploymentID("Model", "app"), DeploymentHandleSource.PROXY)
        self.router.initialize_state(model_name=SERVED)
        self._runner = asyncio.Runner()

    def choose(self, replicas: list[Replica], *args: Any, **kwargs: Any) -> list[str]:
        """Of one request; tells the router that it was sent there."""
        request = self._pending(*args, **kwargs)
        found = self.look(replicas, request)
        self.router.on_request_routed(request, None, None)
        return found

    def look(self, replicas: list[Replica], request: PendingRequest | None) -> list[str]:
        [rank] = self._runner.run(self.router.choose_replicas(replicas, request))
        return sorted(each.name for each in rank)

    def all(self, replicas: list[Replica], *args: Any, **kwargs: Any) -> set[str]:
        """Every replica that the request might meet."""
        return {name for _ in range(50) for name in self.choose(replicas, *args, **kwargs)}

    def pending(self, *args: Any, **kwargs: Any) -> PendingRequest:
        return self._pending(*args, **kwargs)

    def _pending(self, *args: Any, **kwargs: Any) -> PendingRequest:
        async def made() -> PendingRequest:  # its future needs a loop
            return pending(*args, **kwargs)

        return self._runner.run(made())

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def routed() -> Iterator[Routed]:
    made = Routed()
    yield made
    made.close()


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **more})


# ---- requests that name a revision --------------------------------------------------------------

FLEET = [
    replica("a1", ALPHA),
    replica("a2", ALPHA),
    replica("ab", ALPHA, BETA),
    replica("b", BETA),
]


@pytest.mark.parametrize("form", ["beta", "beta@5678abcd", BETA])
@pytest.mark.parametrize(
    "call",
    [
        lambda pin: ((chat(), pin), {}),
        lambda pin: ((chat(),), {"pin": pin}),
        lambda pin: ((), {"request": chat(), "pin": pin, "session": "s"}),
        lambda pin: ((chat(model=f"{SERVED}:{pin}"),), {}),
        lambda pin: ((chat(model=pin), None, "s"), {}),
        lambda pin: (({"prompt": "x", "model": f"{SERVED}:{pin}"},), {}),
        lambda pin: ((["a text to score"], pin), {}),
        lambda pin: ((), {"texts": ["a text to score"], "pin": pin}),
    ],
)
def test_a_request_that_names_a_revision_goes_to_a_replica_that_has_it(
    routed: Routed, form: str, call: Any
) -> None:
    args, kwargs = call(form)
    assert routed.all(FLEET, *args, **kwargs) == {"ab", "b"}


def test_a_pin_is_stronger_than_a_share(routed: Routed) -> None:
    fleet = [replica("a", ALPHA, traffic=traffic(100)), replica("b", BETA, traffic=traffic(100))]
    assert routed.all(fleet, chat(), "alpha") == {"a"}


@pytest.mark.parametrize("pin", ["nobody", "alpha@00000000", "", "@"])
def test_whoever_names_what_nobody_has_is_told_so_by_any_replica(routed: Routed, pin: str) -> None:
    assert routed.all(FLEET, chat(), pin) == {each.name for each in FLEET}


@pytest.mark.parametrize(
    "args",
    [
        (),
        (None,),
        (["texts"],),
        (object(),),
        ({"model": 5, "user": 6},),
        ({"model": ["beta"]}, None, None, "too many"),
        (chat(model=f"{SERVED}:alpha"), "beta"),  # which is refused, but not here
    ],
)
def test_a_call_that_makes_no_sense_is_left_to_any_replica(
    routed: Routed, args: tuple[Any, ...]
) -> None:
    assert routed.all(FLEET, *args) == {each.name for each in FLEET}


def test_a_call_names_its_session_or_its_user() -> None:
    def session(*args: Any, **kwargs: Any) -> str | None:
        return asked(args, kwargs, served=SERVED)[1]

    assert session(chat()) is None
    assert session(chat(user="ann")) == "ann"
    assert session({"user": "ann"}) == "ann"
    assert session(chat(user="ann"), None, "s1") == "s1"
    assert session(request=chat(user="ann"), session="s1") == "s1"
    text = CompletionRequest.model_validate({"prompt": "x", "user": "bob"})
    assert session(text, session=None) == "bob"


# ---- a dedicated canary -------------------------------------------------------------------------


def split_fleet(now: Traffic | None) -> list[Replica]:
    return [
        replica("a1", ALPHA, traffic=now),
        replica("a2", ALPHA, BETA, traffic=now),
        replica("b", BETA, ALPHA, traffic=now),
    ]


@pytest.mark.parametrize("weight", [0.0, 5.0, 40.0, 100.0])
def test_a_dedicated_canary_gets_its_share_on_its_own_replicas(
    routed: Routed, weight: float
) -> None:
    fleet = split_fleet(traffic(weight))
    found = [routed.choose(fleet, chat()) for _ in range(400)]
    assert all(names in (["b"], ["a1", "a2"]) for names in found)
    assert abs(found.count(["b"]) - 4 * weight) <= 3


def test_the_sessions_of_a_dedicated_canary_are_those_that_a_replica_would_choose(
    routed: Routed,
) -> None:
    fleet = split_fleet(traffic(30))
    for session in (f"user {i}" for i in range(100)):
        want = ["b"] if session_position(session, BETA) < 0.3 else ["a1", "a2"]
        assert routed.choose(fleet, chat(), None, session) == want
        assert routed.choose(fleet, chat(user=session)) == want


def test_a_request_that_waits_for_a_place_stays_on_its_side(routed: Routed) -> None:
    fleet = split_fleet(traffic(50))
    for number in range(20):
        request = routed.pending(chat(), id=str(number))
        first = routed.look(fleet, request)
        assert all(routed.look(fleet, request) == first for _ in range(5))
        routed.router.on_request_routed(request, None, None)
    assert not routed.router._to_canary


def test_requests_that_never_found_a_place_are_forgotten(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_UNDECIDED", 10)
    fleet = split_fleet(traffic(50))
    for number in range(30):
        routed.look(fleet, routed.pending(chat(), id=str(number)))
    assert list(routed.router._to_canary) == [str(number) for number in range(20, 30)]


def test_the_newest_decision_is_the_one_that_counts(routed: Routed) -> None:
    def fleet(*decisions: tuple[int, float | None]) -> list[Replica]:
        shares = [(at, None if weight is None else traffic(weight)) for at, weight in decisions]
        (at, now), (other_at, other) = shares
        return [
            replica("a", ALPHA, decision=at, traffic=now),
            replica("b", BETA, decision=other_at, traffic=other),
        ]

    assert routed.all(fleet((2, 100), (1, 0)), chat()) == {"b"}
    assert routed.all(fleet((1, 0), (10, 100)), chat()) == {"b"}
    assert routed.all(fleet((3, 0), (2, 100)), chat()) == {"a"}
    assert routed.all(fleet((3, None), (2, 100)), chat()) == {"a", "b"}
    newer_epoch = [
        Replica("a", routing_stats(epoch=2, generation=1, serves=[ALPHA], traffic=traffic(0))),
        Replica("b", routing_stats(epoch=1, generation=9, serves=[BETA], traffic=traffic(100))),
    ]
    assert routed.all(newer_epoch, chat()) == {"a"}


def test_a_shared_canary_is_the_replicas_own_matter(routed: Routed) -> None:
    fleet = split_fleet(traffic(100, "shared"))
    assert routed.all(fleet, chat()) == {"a1", "a2", "b"}


# ---- when nobody is right, or nothing is known --------------------------------------------------


def test_when_no_replica_of_the_right_side_is_known_any_will_do(routed: Routed) -> None:
    only_stable = [replica(name, ALPHA, traffic=traffic(100)) for name in ("a1", "a2")]
    assert routed.all(only_stable, chat()) == {"a1", "a2"}
    only_canary = [replica(name, BETA, traffic=traffic(0)) for name in ("b1", "b2")]
    assert routed.all(only_canary, chat()) == {"b1", "b2"}


def test_replicas_that_said_nothing_yet_get_requests_only_if_nobody_did(routed: Routed) -> None:
    silent = [Replica("s1"), Replica("s2")]
    assert routed.all(silent, chat()) == {"s1", "s2"}
    assert routed.all(silent, chat(), "alpha") == {"s1", "s2"}
    assert routed.all([*silent, *split_fleet(traffic(100))], chat()) == {"b"}
    assert routed.all([*silent, *split_fleet(None)], chat()) == {"s1", "s2", "a1", "a2", "b"}


def test_what_replicas_of_another_version_say_is_no_reason_for_a_request_to_hang(
    routed: Routed,
) -> None:
    strange = [
        Replica("a", {"decision": [1, 1], "serves": [ALPHA], "traffic": {"share": 5}}),
        Replica("b", {"decision": [1, 1], "serves": 7}),
    ]
    assert routed.all(strange, chat()) == {"a", "b"}
    assert routed.all(strange, chat(), "beta") == {"a", "b"}


def test_two_of_many_are_chosen_and_one_of_one(routed: Routed) -> None:
    many = [replica(str(number), ALPHA) for number in range(9)]
    assert len(set(routed.choose(many, chat()))) == 2
    assert routed.choose(many[:1], chat()) == ["0"]
    assert routed.choose([], chat()) == []
    assert len(routed.look(many, None)) == 2


def test_a_request_waits_longer_each_time_that_all_its_replicas_are_full(routed: Routed) -> None:
    for args in ((chat(),), (chat(), "beta"), ()):
        request = routed.pending(*args)
        routed.look(split_fleet(traffic(50)), request)
        assert request.routing_context.should_backoff


# ---- what a replica says ------------------------------------------------------------------------


@pytest.mark.parametrize("now", [None, traffic(12.5), traffic(5, "shared")])
def test_what_a_replica_says_is_plain_data_and_is_read_as_it_was_meant(now: Traffic | None) -> None:
    said = routing_stats(epoch=3, generation=4, serves=[ALPHA, BETA], traffic=now)
    assert {type(value) for value in said.values()} <= {list, dict, type(None)}
    assert (said["decision"], said["serves"]) == ([3, 4], [ALPHA, BETA])
    assert newest_traffic([Replica("a", said)]) == now


# ---- what Ray has, and did not promise ----------------------------------------------------------


def test_ray_still_names_what_the_router_is_made_of() -> None:
    for name in ("PendingRequest", "ReplicaID", "RequestRouter", "RunningReplica"):
        assert hasattr(request_router, name), f"ray.serve.request_router has no {name} any more"


def test_ray_still_asks_a_router_the_same_questions() -> None:
    for name in ("choose_replicas", "on_request_routed"):
        theirs = list(inspect.signature(getattr(RequestRouter, name)).parameters)
        ours = list(inspect.signature(getattr(RevisionRouter, name)).parameters)
        assert theirs == ours, f"Ray calls {name} of a router with other arguments now: {theirs}"
    assert callable(RequestRouter.initialize_state), "routers have no initialize_state any more"


def test_ray_still_says_of_a_request_what_was_asked_and_lets_it_wait(routed: Routed) -> None:
    request = routed.pending("x", pin="y", id="me")
    said = (request.args, request.kwargs, request.metadata.internal_request_id)
    assert said == (["x"], {"pin": "y"}, "me"), "a PendingRequest names its parts in another way"
    waits = request.routing_context.should_backoff
    assert waits is False, "requests back off in another way: should_backoff is not what it was"
    source = inspect.getsource(RequestRouter._choose_replicas_with_backoff)
    assert "routing_context.should_backoff" in source, "should_backoff is not asked any more"


def test_ray_still_passes_on_what_a_replica_says() -> None:
    assert isinstance(inspect.getattr_static(RunningReplica, "routing_stats", None), property), (
        "RunningReplica has no routing_stats any more"
    )
    fields = RequestRouterConfig.model_fields
    for name in ("request_router_class", "request_router_kwargs", "request_routing_stats_period_s"):
        assert name in fields, f"RequestRouterConfig has no {name} any more"
    assert "request_router_config" in inspect.signature(serve.deployment).parameters
