"""The client against a scripted transport: what it sends, what it returns, what it raises."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time

import httpx
import pytest

from serve_app.client.http import HotswapClient, RequestRejected, ServerUnreachable
from serve_app.rollout.plan import Plan
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    ErrorBody,
    ErrorDetail,
    FleetView,
    RolloutList,
    RolloutView,
    View,
)

URL = "http://fleet.test:8000"
FLEET = FleetView(ready=True, epoch=1, generation=4, stable="a@11111111", journal_uri="/j")
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


def answer(view: View, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=view.model_dump())


def refusal(status: int, code: str, message: str = "no") -> httpx.Response:
    return answer(ErrorBody(error=ErrorDetail(message=message, code=code)), status)


def away() -> Exception:
    return httpx.ConnectError("Connection refused")


class ScriptedServer(httpx.BaseTransport):
    """Plays its steps in order, the last one for ever, and remembers what it was asked."""

    def __init__(self, *steps: httpx.Response | Exception, delay_s: float = 0) -> None:
        self.steps = list(steps)
        self.delay_s = delay_s
        self.asked: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        time.sleep(self.delay_s)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        # a response object is spent once it is read; a script may repeat its last one
        return httpx.Response(step.status_code, headers=step.headers, content=step.content)


def client_of(server: ScriptedServer, *, token: str | None = None) -> HotswapClient:
    return HotswapClient(URL, token=token, transport=server)


def test_the_fleet_and_the_rollouts_come_back_as_views() -> None:
    server = ScriptedServer(answer(FLEET), answer(RolloutList(data=[ROLLOUT])), answer(ROLLOUT))
    with client_of(server) as client:
        assert client.fleet() == FLEET
        assert client.rollouts().data == [ROLLOUT]
        assert client.rollout("r1") == ROLLOUT
    paths = [request.url.path for request in server.asked]
    assert paths == ["/admin/fleet", "/admin/rollouts", "/admin/rollouts/r1"]


def test_start_sends_the_plan_and_leaves_out_what_was_not_said() -> None:
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
    assert waits == [120.0, 120.0, 30.0, 120.0], "loading ends when every replica has done it"


def test_abort_and_undo_are_posts_without_a_body() -> None:
    server = ScriptedServer(answer(ROLLOUT))
    with client_of(server) as client:
        client.abort("r1")
        client.undo()
    asked = [(request.method, request.url.path, request.content) for request in server.asked]
    assert asked == [("POST", "/admin/rollouts/r1/abort", b""), ("POST", "/admin/undo", b"")]


@pytest.mark.parametrize("verb", ["promote", "abort", "pause", "resume", "retry"])
def test_every_verb_can_say_what_it_saw_and_what_it_is_called(verb: str) -> None:
    server = ScriptedServer(answer(ROLLOUT))
    with client_of(server) as client:
        assert getattr(client, verb)("r 1", expected_generation=0, key="nightly") == ROLLOUT
        getattr(client, verb)("r 1")
    first, second = server.asked
    assert first.url.raw_path == f"/admin/rollouts/r%201/{verb}?expected_generation=0".encode()
    assert first.headers["idempotency-key"] == "nightly"
    assert second.url.raw_path == f"/admin/rollouts/r%201/{verb}".encode()
    assert "idempotency-key" not in second.headers


def test_undo_says_where_to_and_promote_how_far() -> None:
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


@pytest.mark.parametrize("base", ["http://h/prefix", "http://h/prefix/"])
def test_a_route_prefix_is_kept(base: str) -> None:
    server = ScriptedServer(answer(FLEET))
    with HotswapClient(base, transport=server) as client:
        client.fleet()
    assert server.asked[0].url.path == "/prefix/admin/fleet"


def test_the_token_is_sent_as_a_bearer_and_an_empty_one_is_not() -> None:
    server = ScriptedServer(answer(FLEET))
    for token in ("s3cret", ""):
        with client_of(server, token=token) as client:
            client.fleet()
    sent = [request.headers.get("authorization") for request in server.asked]
    assert sent == ["Bearer s3cret", None]


@pytest.mark.parametrize("address", ["localhost:8000", "", "ftp://h", "http://", "http://h:port"])
def test_an_address_that_is_none_is_refused_before_anything_is_sent(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        HotswapClient(address)


def test_a_token_that_no_header_can_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="token"):
        HotswapClient(URL, token="a\nb")


def test_a_refusal_has_the_servers_status_code_and_sentence() -> None:
    server = ScriptedServer(refusal(400, "rank_over_envelope", "rank 64 is over 16"))
    with client_of(server) as client, pytest.raises(RequestRejected) as caught:
        client.start(Plan(adapter="x"))
    refused = caught.value
    assert (refused.status, refused.code) == (400, "rank_over_envelope")
    assert refused.message == "rank 64 is over 16"
    assert str(refused) == (
        "the server rejected the request (400 rank_over_envelope): rank 64 is over 16"
    )


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_a_refusal_without_our_error_body_is_still_a_refusal(status: int) -> None:
    server = ScriptedServer(httpx.Response(status, text="<h1>no</h1>"))
    with client_of(server) as client, pytest.raises(RequestRejected) as caught:
        client.fleet()
    assert caught.value.code == f"http_{status}"


@pytest.mark.parametrize(
    "step",
    [
        httpx.Response(200, text="<h1>It works!</h1>"),
        httpx.Response(200, json={"some": "other program"}),
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(307, headers={"location": "/login"}),
        httpx.Response(502, text="bad gateway"),
        away(),
        httpx.ReadTimeout("timed out"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
    ],
    ids=str,
)
def test_whatever_is_not_a_hotswap_server_is_unreachable(step: httpx.Response | Exception) -> None:
    with client_of(ScriptedServer(step)) as client, pytest.raises(ServerUnreachable) as caught:
        client.fleet()
    assert str(caught.value).startswith(f"cannot reach the server at {URL}: ")
    assert "\n" not in str(caught.value)


def test_a_lost_answer_to_a_post_says_that_it_may_have_been_accepted() -> None:
    lost = ScriptedServer(httpx.ReadTimeout("timed out"))
    with client_of(lost) as client, pytest.raises(ServerUnreachable, match="may have accepted"):
        client.undo()
    with client_of(ScriptedServer(away())) as client, pytest.raises(ServerUnreachable) as caught:
        client.undo()
    assert caught.value.why == "Connection refused"


@pytest.mark.parametrize(
    "error", [RequestRejected(409, "nothing_to_undo", "no"), ServerUnreachable(URL, "refused")]
)
def test_the_errors_survive_a_pickle(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), vars(again), str(again)) == (type(error), vars(error), str(error))


def test_watch_yields_until_the_rollout_has_ended_and_the_end_is_last() -> None:
    views = [ROLLOUT, FLEET, ROLLOUT, FLEET, ENDED, FLEET]
    server = ScriptedServer(*map(answer, views))
    with client_of(server) as client:
        moments = list(client.watch("r1", period_s=0))
    assert moments == [(ROLLOUT, FLEET), (ROLLOUT, FLEET), (ENDED, FLEET)]


def test_watch_lives_through_an_outage_of_the_server() -> None:
    steps: list[httpx.Response | Exception] = [answer(ROLLOUT), answer(FLEET)]
    steps += [away(), refusal(503, "controller_restarts"), httpx.Response(502, text="proxy")]
    steps += [httpx.ReadTimeout("timed out"), httpx.Response(404, text="no route yet")]
    steps += [answer(ENDED), away(), answer(ENDED), answer(FLEET)]
    server = ScriptedServer(*steps)
    with client_of(server) as client:
        moments = list(client.watch("r1", period_s=0))
    assert [rollout.state for rollout, _ in moments] == ["progressing", "succeeded"]


def test_watch_gives_up_on_an_outage_that_lasts_and_says_how_long_it_waited() -> None:
    server = ScriptedServer(answer(ROLLOUT), answer(FLEET), refusal(503, "fleet_not_ready"))
    with client_of(server) as client:
        moments = client.watch("r1", period_s=0, outage_s=0)
        next(moments)
        with pytest.raises(ServerUnreachable, match=r"gave up after 0 s .*fleet_not_ready"):
            next(moments)


def test_an_outage_begins_with_the_first_failure_and_not_with_a_request_that_hangs() -> None:
    hangs = ScriptedServer(httpx.ReadTimeout("timed out"), answer(FLEET), delay_s=0.1)
    with client_of(hangs) as client:
        assert next(client.watch_fleet(period_s=0, outage_s=0.05)) == FLEET


def test_watch_does_not_wait_on_a_refusal() -> None:
    server = ScriptedServer(refusal(404, "no_such_rollout"))
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


def test_the_client_and_the_cli_need_neither_ray_nor_torch() -> None:
    code = (
        "import sys, serve_app.client.cli\n"
        "heavy = {'ray', 'torch', 'transformers', 'peft', 'hotswap_lib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
