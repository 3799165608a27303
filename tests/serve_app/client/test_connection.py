"""Addresses, tokens, and answers that are not a view: the errors they raise."""

from __future__ import annotations

import httpx
import pytest

from serve_app.client.errors import RequestRejected, ServerUnreachable
from serve_app.client.http import HotswapClient
from serve_app.rollout.plan import Plan
from tests.serve_app.client.scripted_server import (
    FLEET,
    URL,
    ScriptedServer,
    answer,
    away,
    client_of,
    rejection,
)


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
def test_an_invalid_address_is_a_value_error(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        HotswapClient(address)


def test_a_token_that_no_header_can_carry_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="token"):
        HotswapClient(URL, token="a\nb")


def test_a_rejection_has_the_servers_status_code_and_sentence() -> None:
    server = ScriptedServer(rejection(400, "rank_over_envelope", "rank 64 is over 16"))
    with client_of(server) as client, pytest.raises(RequestRejected) as caught:
        client.start(Plan(adapter="x"))
    rejected = caught.value
    assert (rejected.status, rejected.code) == (400, "rank_over_envelope")
    assert rejected.message == "rank 64 is over 16"
    assert str(rejected) == (
        "the server rejected the request (400 rank_over_envelope): rank 64 is over 16"
    )


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_a_rejection_without_our_error_body_is_still_a_rejection(status: int) -> None:
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
def test_an_answer_that_is_not_a_hotswap_servers_is_unreachable(
    step: httpx.Response | Exception,
) -> None:
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
