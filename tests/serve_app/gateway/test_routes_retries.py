"""A request whose replica died is sent to another replica, unless its response has begun."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import ray.exceptions
from ray.serve.exceptions import BackPressureError

from serve_app.wire.errors import (
    DeadlineExceeded,
    EngineStopped,
    GenerationFailed,
    InvalidRequest,
    RevisionNotServed,
)
from tests.serve_app.gateway.fakes import (
    ASKED,
    REVISION,
    TEXT,
    Call,
    Door,
    FakeModel,
    StreamMethod,
    code_of,
    events,
)

DIED = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.ActorUnavailableError("gone for now", None),
    EngineStopped(),
]


class Dying:
    """A method of a handle; the replica dies in each of its first calls."""

    def __init__(self, method: Any, *deaths: Exception) -> None:
        self.method, self.deaths = method, list(deaths)
        self.asked = method.asked

    def remote(self, *arguments: Any) -> Call:
        self.method.fault = self.deaths.pop(0) if self.deaths else None
        call: Call = self.method.remote(*arguments)
        return call


@pytest.mark.parametrize("death", DIED, ids=lambda death: type(death).__name__)
@pytest.mark.parametrize(("path", "body", "method"), ASKED)
def test_a_request_whose_replica_died_is_retried(
    path: str, body: dict[str, Any], method: str, death: Exception
) -> None:
    door = Door()
    dying = Dying(getattr(door.model, method), death, death)
    setattr(door.model, method, dying)
    headers = {"x-adapter-revision": REVISION, "x-session-id": "s-1"}
    assert door("POST", path, json=body, headers=headers).status_code == 200
    assert [(pin, session) for _, pin, session in dying.asked] == [(REVISION, "s-1")] * 3


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_a_request_with_which_three_replicas_died_is_not_retried(more: dict[str, Any]) -> None:
    door = Door()
    door.model.complete.fault = door.model.stream.fault = ray.exceptions.ActorDiedError()
    response = door("POST", "/v1/completions", json=TEXT | more)
    assert (response.status_code, code_of(response)) == (503, "replica_died")
    assert len(door.model.complete.asked) + len(door.model.stream.asked) == 3


class DyingStream(StreamMethod):
    """A streaming method; `deaths`: the chunks after which the replica dies, for each call."""

    def __init__(self, answer: Callable[..., Any], *deaths: int) -> None:
        super().__init__(answer)
        self.deaths = list(deaths)
        self.breaks_with = ray.exceptions.ActorDiedError()

    def remote(self, *arguments: Any) -> Call:
        self.asked.append(arguments)
        return Call(self._until_death(arguments[0], self.deaths.pop(0) if self.deaths else None))

    async def _until_death(self, request: Any, death: int | None) -> AsyncIterator[dict[str, Any]]:
        for chunk in self.answer(request)[:death]:
            yield chunk
        if death is not None:
            raise self.breaks_with


def test_a_stream_whose_replica_died_before_its_first_chunk_is_retried() -> None:
    door = Door()
    stream: Any = DyingStream(door.model.chunks, 0, 0)
    door.model.stream = stream
    response = door("POST", "/v1/completions", json=TEXT | {"stream": True})
    assert events(response)[-1] == "[DONE]"
    assert (len(events(response)), len(stream.asked)) == (4, 3)


def test_a_stream_whose_replica_died_after_its_first_chunk_is_not_retried() -> None:
    door = Door()
    stream: Any = DyingStream(door.model.chunks, 1)
    door.model.stream = stream
    response = door("POST", "/v1/completions", json=TEXT | {"stream": True})
    first, last = events(response)
    assert "error" not in json.loads(first)
    assert json.loads(last)["error"]["code"] == "replica_died"
    assert len(stream.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        GenerationFailed("no"),
        DeadlineExceeded(3.0),
        RevisionNotServed("x", (REVISION,)),
        InvalidRequest(400, "context_length_exceeded", "too long"),
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
    ],
    ids=lambda fault: type(fault).__name__,
)
@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_an_error_that_would_come_again_is_not_retried(
    fault: Exception, more: dict[str, Any]
) -> None:
    door = Door(FakeModel(fault))
    assert not door("POST", "/v1/completions", json=TEXT | more).is_success
    assert len(door.model.complete.asked) + len(door.model.stream.asked) == 1
