"""More than a fleet can take, and less fleet than there was: refused in time, nothing stuck."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray import serve

from serve_app.app import build

from .conftest import Cluster, deployed
from .fleet import Fleet, code_of, eventually
from .tiny_world import TinyWorld

LONG: dict[str, Any] = {"prompt": "go on", "max_tokens": 800, "temperature": 0}
SHORT: dict[str, Any] = {"prompt": "short", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, tireless: TinyWorld) -> Iterator[Fleet]:
    """One replica that runs two requests, and two may wait."""
    with deployed(
        cluster,
        tireless,
        app="pressure",
        replicas=1,
        max_ongoing_requests=2,
        max_queued_requests=2,
        poll_s=0.5,
    ) as running:
        yield running


def test_what_is_too_much_is_429_and_the_others_are_answered(fleet: Fleet) -> None:
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(fleet.post, LONG) for _ in range(2)]
        fleet.until_running(2)
        burst = list(pool.map(lambda _: fleet.post(SHORT), range(8)))
    assert [future.result().status_code for future in running] == [200, 200]
    refused = [answer for answer in burst if answer.status_code != 200]
    assert len(refused) == 6  # two waited
    assert {code_of(answer) for answer in refused} == {"too_many_requests"}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert_free(fleet)


def test_who_leaves_while_running_or_waiting_frees_their_place(fleet: Fleet) -> None:
    def leave(_: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            fleet.post(SHORT, timeout_s=1)

    with fleet.streaming(LONG), fleet.streaming(LONG), ThreadPoolExecutor(2) as pool:
        list(pool.map(leave, range(2)))
    assert_free(fleet)


def assert_free(fleet: Fleet) -> None:
    """Nobody's place is lost: two run and two wait, as before."""
    fleet.until_running(0)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(fleet.post, LONG | {"max_tokens": 300}) for _ in range(2)]
        fleet.until_running(2)
        waiting = [pool.submit(fleet.post, SHORT) for _ in range(2)]
        answers = [future.result() for future in (*running, *waiting)]
    assert [answer.status_code for answer in answers] == [200] * 4
    fleet.until_running(0)


@pytest.mark.slow
def test_a_stream_that_nobody_reads_holds_up_nobody_and_is_whole_when_it_is_read(
    fleet: Fleet,
) -> None:
    """Serve has no backpressure on a stream: the replica runs on and its chunks wait in the proxy.

    So what one such client costs has an end: a chunk for each token of each choice.
    """
    body = LONG | {"n": 4, "logprobs": 5, "max_tokens": 1000}
    gateway, proxy = fleet.process("Gateway"), fleet.proxy()
    before = gateway.memory_info().rss + proxy.memory_info().rss
    with fleet.streaming(body) as unread:
        began = time.monotonic()
        for _ in range(3):
            assert fleet.post(SHORT, timeout_s=60).status_code == 200
        assert time.monotonic() - began < 60
        fleet.until_running(0)  # it has run to its end, unread
        grown = gateway.memory_info().rss + proxy.memory_info().rss - before
        lines = [line for line in unread if line]
    size = sum(map(len, lines))
    assert lines[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]]
    assert len([reason for reason in reasons if reason]) == 4
    assert grown < 40 * size + 32 * 2**20, (grown, size)


@pytest.mark.slow
def test_a_replica_that_is_killed_breaks_its_streams_and_the_next_one_answers(
    fleet: Fleet,
) -> None:
    [victim] = fleet.settle(replicas=1).replicas
    assert victim.pid is not None
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(fleet.post, LONG)
        streamed = pool.submit(fleet.post, LONG | {"stream": True})
        fleet.until_running(2)
        os.kill(victim.pid, signal.SIGKILL)
        answer, broken = whole.result(), streamed.result()
    if answer.status_code != 200:  # it was asked again, and the next one was not there in time
        assert (answer.status_code, code_of(answer)) == (503, "not_ready")
        assert answer.headers["retry-after"] == "1"
    last = broken.text.strip().rsplit("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_died"

    def next_one() -> bool:
        """Until it is there requests wait, or are told when to come back."""
        began = time.monotonic()
        late = fleet.post(SHORT)
        if late.status_code == 200:
            return True
        assert (late.status_code, late.headers["retry-after"]) == (503, "1"), late.text
        assert time.monotonic() - began < 30
        return False

    eventually(next_one, within_s=120, what="the next replica answering")


@pytest.mark.slow
def test_while_no_replica_has_come_up_requests_are_refused_at_once(
    cluster: Cluster, tireless: TinyWorld
) -> None:
    settings = {"model": str(tireless.model), "num_cpus": 1000, "drain_timeout_s": 1}
    target = serve.RunTarget(build(settings), name="starting", route_prefix="/starting")
    serve.run_many([target], wait_for_applications_running=False)
    fleet = Fleet(url=f"http://127.0.0.1:{cluster.port}/starting", app="starting", world=tireless)
    try:
        with fleet.client:
            eventually(
                lambda: httpx.get(f"{fleet.url}/health", timeout=60).status_code == 503,
                within_s=120,
                what="the gateway answering",
            )
            for body in (SHORT, SHORT | {"stream": True}):
                began = time.monotonic()
                answer = fleet.post(body)
                assert (answer.status_code, code_of(answer)) == (503, "not_ready")
                assert answer.headers["retry-after"] == "1"
                assert time.monotonic() - began < 5
            health = httpx.get(f"{fleet.url}/health")
            assert (health.status_code, code_of(health)) == (503, "not_ready")
    finally:
        serve.delete("starting")


@pytest.mark.slow
def test_an_application_that_is_deleted_finishes_what_it_runs(
    cluster: Cluster, tireless: TinyWorld
) -> None:
    with ThreadPoolExecutor(4) as pool:
        with deployed(cluster, tireless, app="deleted", replicas=1) as fleet:
            body = LONG | {"max_tokens": 1000}
            whole = [pool.submit(fleet.post, body) for _ in range(2)]
            streamed = [pool.submit(fleet.post, body | {"stream": True}) for _ in range(2)]
            fleet.until_running(4)
        assert [future.result().status_code for future in whole] == [200, 200]
        assert all(future.result().text.endswith("data: [DONE]\n\n") for future in streamed)


@pytest.fixture(scope="module")
def tight(cluster: Cluster, tireless: TinyWorld) -> Iterator[Fleet]:
    """One lane, no waiting for it, and a few seconds for each request."""
    with deployed(
        cluster,
        tireless,
        app="tight",
        replicas=1,
        lanes=1,
        lane_overflow="refuse",
        request_timeout_s=4,
    ) as running:
        yield running


TOO_LONG = LONG | {"n": 16, "max_tokens": 4000}


@pytest.mark.slow
def test_a_request_past_its_deadline_is_504_and_gone(tight: Fleet) -> None:
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(tight.post, TOO_LONG)
        streamed = pool.submit(tight.post, TOO_LONG | {"stream": True})
        answer, broken = whole.result(), streamed.result()
    assert (answer.status_code, code_of(answer)) == (504, "deadline_exceeded")
    last = broken.text.strip().rsplit("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    tight.until_running(0)


@pytest.mark.slow
def test_where_lanes_refuse_a_busy_one_is_429_for_another_revision(tight: Fleet) -> None:
    load = {"lora_name": "beta", "lora_path": str(tight.world.adapter("beta"))}
    assert tight.post(load, path="/v1/load_lora_adapter").status_code == 200
    with tight.streaming(TOO_LONG):
        refused = tight.post(SHORT | {"model": "beta"})
    assert (refused.status_code, code_of(refused)) == (429, "lanes_taken")
    assert refused.headers["retry-after"] == "1"
    tight.until_running(0)
    assert tight.post(SHORT | {"model": "beta"}).json()["system_fingerprint"].startswith("beta@")
