"""The replicas that the router prefers for a request, with fakes of Ray's replicas.

Ray's own part of the contract is checked in tests/serve_app/wire/test_ray_internals.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import PendingRequest

from hotswap_lib import Revision
from serve_app.gateway import router
from serve_app.gateway.router import RevisionRouter, pin_and_session
from serve_app.openai.requests import ChatRequest, CompletionRequest
from serve_app.rollout.state import Traffic
from serve_app.rollout.traffic_split import session_position
from serve_app.wire.routing_stats import parse_traffic, routing_stats

ALPHA = Revision("alpha", "1234abcd" * 8).key
BETA = Revision("beta", "5678abcd" * 8).key
GAMMA = Revision("gamma", "9abc1234" * 8).key
SERVED = "tiny"


@dataclass
class Replica:
    """The part of a `RunningReplica` that the router reads."""

    name: str
    routing_stats: Mapping[str, Any] = field(default_factory=dict)


def replica(name: str, *serves: str, decision: int = 1, traffic: Traffic | None = None) -> Replica:
    return Replica(
        name, routing_stats(epoch=1, generation=decision, serves=serves, traffic=traffic)
    )


def traffic(weight: float, placement: Any = "dedicated") -> Traffic:
    return Traffic(canary=BETA, weight=weight, placement=placement, step_id="r1.1.1")


def pending(*args: Any, id: str = "one", **kwargs: Any) -> PendingRequest:
    metadata = SimpleNamespace(internal_request_id=id)
    return PendingRequest(args=list(args), kwargs=kwargs, metadata=metadata)


class UnconnectedRouter(RevisionRouter):
    """A router without Ray's part, which needs a running cluster."""

    def __init__(self) -> None:
        self.initialize_state(model_name=SERVED)


class Routed:
    """A router, and the names of the replicas that it chooses."""

    def __init__(self) -> None:
        self.router = UnconnectedRouter()
        self._runner = asyncio.Runner()

    def choose(self, replicas: list[Replica], *args: Any, **kwargs: Any) -> list[str]:
        """Chooses for a new request, which is then placed."""
        request = self.pending(*args, **kwargs)
        found = self.look(replicas, request)
        self.router.on_request_routed(request, None, None)
        return found

    def look(self, replicas: list[Replica], request: PendingRequest | None) -> list[str]:
        """Chooses for a request that goes on waiting."""
        [rank] = self._runner.run(self.router.choose_replicas(replicas, request))
        return sorted(each.name for each in rank)

    def all(self, replicas: list[Replica], *args: Any, **kwargs: Any) -> set[str]:
        """Every replica to which the request may go."""
        return {name for _ in range(50) for name in self.choose(replicas, *args, **kwargs)}

    def pending(self, *args: Any, **kwargs: Any) -> PendingRequest:
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


@pytest.mark.parametrize("pin", ["unknown", "alpha@00000000", "", "@"])
def test_a_request_for_an_unknown_revision_goes_to_any_replica_which_refuses_it(
    routed: Routed, pin: str
) -> None:
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
        return pin_and_session(args, kwargs, served=SERVED)[1]

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


def test_a_placed_request_is_forgotten(routed: Routed) -> None:
    request = routed.pending(chat(), id="the same")
    sides = set()
    for _ in range(20):
        sides.add(tuple(routed.look(split_fleet(traffic(50)), request)))
        routed.router.on_request_routed(request, None, None)
    assert sides == {("b",), ("a1", "a2")}


def test_requests_that_never_found_a_replica_do_not_pile_up(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_MAX_UNPLACED", 10)
    fleet = split_fleet(traffic(50))
    waiting = routed.pending(chat(), id="waiting")
    sides = set()
    for number in range(20):
        sides.add(tuple(routed.look(fleet, waiting)))
        for other in range(10):  # so many that the decision for the first one is dropped
            routed.look(fleet, routed.pending(chat(), id=f"{number} {other}"))
    assert sides == {("b",), ("a1", "a2")}


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


def test_requests_under_a_shared_canary_go_to_all_replicas(routed: Routed) -> None:
    fleet = split_fleet(traffic(100, "shared"))
    assert routed.all(fleet, chat()) == {"a1", "a2", "b"}


# ---- when no replica is preferred ---------------------------------------------------------------


def test_when_no_replica_of_the_right_side_is_known_any_will_do(routed: Routed) -> None:
    only_stable = [replica(name, ALPHA, traffic=traffic(100)) for name in ("a1", "a2")]
    assert routed.all(only_stable, chat()) == {"a1", "a2"}
    only_canary = [replica(name, BETA, traffic=traffic(0)) for name in ("b1", "b2")]
    assert routed.all(only_canary, chat()) == {"b1", "b2"}


def test_replicas_without_statistics_get_requests_only_if_no_replica_has_any(
    routed: Routed,
) -> None:
    silent = [Replica("s1"), Replica("s2")]
    assert routed.all(silent, chat()) == {"s1", "s2"}
    assert routed.all(silent, chat(), "alpha") == {"s1", "s2"}
    assert routed.all([*silent, *split_fleet(traffic(100))], chat()) == {"b"}
    assert routed.all([*silent, *split_fleet(None)], chat()) == {"s1", "s2", "a1", "a2", "b"}


def test_a_request_is_placed_although_replicas_publish_another_format(
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


# ---- routing statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("now", [traffic(12.5), traffic(5, "shared")])
def test_routing_statistics_are_plain_data_and_survive_the_round_trip(now: Traffic) -> None:
    stats = routing_stats(epoch=3, generation=4, serves=[ALPHA, BETA], traffic=now)
    assert (stats["decision"], stats["serves"]) == ([3, 4], [ALPHA, BETA])
    assert type(stats["traffic"]) is dict
    assert parse_traffic(stats["traffic"]) == now
    silent = routing_stats(epoch=3, generation=4, serves=[ALPHA], traffic=None)
    assert silent["traffic"] is None
