"""The client: its requests, and the outages it waits through."""

from __future__ import annotations

import json

import httpx
import pytest

from serve_app.client.errors import RequestRejected, ServerUnreachable
from serve_app.rollout.plan import Plan
from serve_app.wire.admin import AdapterList, AdapterView, RolloutList, RolloutView
from tests.serve_app.client.scripted_server import (
    FLEET,
    ScriptedServer,
    answer,
    away,
    client_of,
    rejection,
)

ROLLOUT = RolloutView(
    id="r1",
    target="b@22222222",
    previous="a@11111111",
    strategy="rolling",
    max_unavailable=1,
    state="progressing",
    created_at=1.0,
)

ADAPTER = AdapterView(
    lora_name="bot", lora_path="/bot", revision="bot@33333333", generation=5, ready=2, total=2
)

ENDED = ROLLOUT.model_copy(update={"state": "succeeded", "ended_at": 2.0})


def test_the_fleet_and_the_rollouts_come_back_as_views() -> None:
    server = ScriptedServer(answer(FLEET), answer(RolloutList(data=[ROLLOUT])), answer(ROLLOUT))
    with client_of(server) as client:
        assert client.fleet() == FLEET
        assert client.rollouts().data == [ROLLOUT]
        assert client.rollout("r1") == ROLLOUT
    paths = [request.url.path for request in server.asked]
    assert paths == ["/admin/fleet", "/admin/rollouts", "/admin/rollouts/r1"]


def test_start_sends_the_plan_without_its_defaults() -> None:
    server = ScriptedServer(answer(ROLLOUT, 201))
    with client_of(server) as client:
        assert client.start(Plan(adapter="org/pirate", strategy="all_at_once")) == ROLLOUT
        plan = Plan(adapter="x", name="n", in_flight="drain", progress_deadline=9.5)
        client.start(plan, expected_generation=3, key="nightly 7")
    bare, full = (json.loads(request.content) for request in server.asked)
    assert bare == {"adapter": "org/pirate", "strategy": "all_at_once"}
    named = {"adapter": "x", "name": "n", "in_flight": "drain"}
    assert full == named | {"progress_deadline": 9.5}
    first, second = server.asked
    assert (first.url.query, first.headers.get("idempotency-key")) == (b"", None)
    assert second.url.query == b"expected_generation=3"
    assert second.headers["idempotency-key"] == "nightly 7"


def test_adapters_are_loaded_listed_and_unloaded_in_vllms_terms() -> None:
    listed = AdapterList(data=[ADAPTER], generation=5)
    server = ScriptedServer(answer(ADAPTER), answer(ADAPTER), answer(listed), answer(ADAPTER))
    with client_of(server) as client:
        assert client.load_adapter("bot", "/bot") == ADAPTER
        client.load_adapter("bot", "/bot", load_inplace=True, expected_generation=0)
        assert client.adapters() == listed
        assert client.unload_adapter("bot", expected_generation=5) == ADAPTER
    asked = [(request.method, request.url.path) for request in server.asked]
    assert asked == [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/v1/lora_adapters"),
        ("POST", "/v1/unload_lora_adapter"),
    ]
    bodies = [json.loads(request.content) for request in server.asked if request.content]
    named = {"lora_name": "bot", "lora_path": "/bot"}
    assert bodies == [
        named | {"load_inplace": False},
        named | {"load_inplace": True, "expected_generation": 0},
        {"lora_name": "bot", "expected_generation": 5},
    ]
    waits = [request.extensions["timeout"]["read"] for request in server.asked]
    assert waits == [120.0, 120.0, 30.0, 120.0], (
        "loading returns when every replica has the adapter"
    )


def test_abort_and_undo_are_posts_without_a_body() -> None:
    server = ScriptedServer(answer(ROLLOUT))
    with client_of(server) as client:
        client.abort("r1")
        client.undo()
    asked = [(request.method, request.url.path, request.content) for request in server.asked]
    assert asked == [("POST", "/admin/rollouts/r1/abort", b""), ("POST", "/admin/undo", b"")]


@pytest.mark.parametrize("verb", ["promote", "abort", "pause", "resume", "retry"])
def test_every_verb_takes_an_expected_generation_and_an_idempotency_key(verb: str) -> None:
    server = ScriptedServer(answer(ROLLOUT))
    with client_of(server) as client:
        assert getattr(client, verb)("r 1", expected_generation=0, key="nightly") == ROLLOUT
        getattr(client, verb)("r 1")
    first, second = server.asked
    assert first.url.raw_path == f"/admin/rollouts/r%201/{verb}?expected_generation=0".encode()
    assert first.headers["idempotency-key"] == "nightly"
    assert second.url.raw_path == f"/admin/rollouts/r%201/{verb}".encode()
    assert "idempotency-key" not in second.headers


def test_undo_sends_its_target_and_promote_full() -> None:
    server = ScriptedServer(answer(ROLLOUT))
    with client_of(server) as client:
        client.undo(to="pirate@11111111 &x=1", expected_generation=3)
        client.promote("r1", full=True)
    undo, promote = server.asked
    assert dict(undo.url.params) == {"to": "pirate@11111111 &x=1", "expected_generation": "3"}
    assert dict(promote.url.params) == {"full": "True"}


def test_an_id_can_not_reach_another_address() -> None:
    server = ScriptedServer(answer(ROLLOUT))
    with client_of(server) as client:
        client.rollout("../fleet?x=1")
    assert server.asked[0].url.raw_path == b"/admin/rollouts/..%2Ffleet%3Fx%3D1"


def test_watch_yields_until_the_rollout_has_ended_and_the_end_is_last() -> None:
    views = [ROLLOUT, FLEET, ROLLOUT, FLEET, ENDED, FLEET]
    server = ScriptedServer(*map(answer, views))
    with client_of(server) as client:
        moments = list(client.watch("r1", period_s=0))
    assert moments == [(ROLLOUT, FLEET), (ROLLOUT, FLEET), (ENDED, FLEET)]


def test_watch_lives_through_an_outage_of_the_server() -> None:
    steps: list[httpx.Response | Exception] = [answer(ROLLOUT), answer(FLEET)]
    steps += [away(), rejection(503, "controller_restarts"), httpx.Response(502, text="proxy")]
    steps += [httpx.ReadTimeout("timed out"), httpx.Response(404, text="no route yet")]
    steps += [answer(ENDED), away(), answer(ENDED), answer(FLEET)]
    server = ScriptedServer(*steps)
    with client_of(server) as client:
        moments = list(client.watch("r1", period_s=0))
    assert [rollout.state for rollout, _ in moments] == ["progressing", "succeeded"]


def test_watch_raises_after_an_outage_that_lasts_too_long() -> None:
    server = ScriptedServer(answer(ROLLOUT), answer(FLEET), rejection(503, "fleet_not_ready"))
    with client_of(server) as client:
        moments = client.watch("r1", period_s=0, outage_s=0)
        next(moments)
        with pytest.raises(ServerUnreachable, match=r"gave up after 0 s .*fleet_not_ready"):
            next(moments)


def test_an_outage_begins_with_the_first_failure_and_not_with_a_request_that_hangs() -> None:
    hangs = ScriptedServer(httpx.ReadTimeout("timed out"), answer(FLEET), delay_s=0.1)
    with client_of(hangs) as client:
        assert next(client.watch_fleet(period_s=0, outage_s=0.05)) == FLEET


def test_watch_does_not_wait_on_a_rejection() -> None:
    server = ScriptedServer(rejection(404, "no_such_rollout"))
    with client_of(server) as client, pytest.raises(RequestRejected, match="no_such_rollout"):
        next(client.watch("r9"))
    assert len(server.asked) == 1


def test_watch_fleet_goes_on_through_an_outage() -> None:
    server = ScriptedServer(answer(FLEET), away(), answer(FLEET))
    with client_of(server) as client:
        fleets = client.watch_fleet(period_s=0)
        assert [next(fleets), next(fleets)] == [FLEET, FLEET]


def test_wait_returns_the_ended_rollout() -> None:
    with client_of(ScriptedServer(answer(ENDED), answer(FLEET))) as client:
        assert client.wait("r1", timeout_s=5) == ENDED


def test_wait_raises_a_timeout_while_the_rollout_runs() -> None:
    with (
        client_of(ScriptedServer(answer(ROLLOUT), answer(FLEET))) as client,
        pytest.raises(TimeoutError, match="r1 has not ended after 0 s"),
    ):
        client.wait("r1", timeout_s=0)
