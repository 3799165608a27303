"""Requests that wait while no replica is running, and the 503 that ends the wait."""

from __future__ import annotations

from typing import Any

import pytest
import ray.exceptions

from tests.serve_app.gateway.fakes import (
    ASKED,
    FLEET,
    TEXT,
    Door,
    FakeController,
    FakeModel,
    code_of,
)

EMPTY = FLEET.model_copy(update={"ready": False, "replicas": []})


@pytest.mark.parametrize(("path", "body", "method"), ASKED)
def test_while_a_fleet_starts_requests_are_refused_at_once(
    path: str, body: dict[str, Any], method: str
) -> None:
    door = Door(controller=FakeController(fleet=EMPTY))
    response = door("POST", path, json=body)
    assert (response.status_code, code_of(response)) == (503, "not_ready")
    assert response.headers["retry-after"] == "1"
    assert getattr(door.model, method).asked == []


def test_the_controller_is_not_asked_while_replicas_answer() -> None:
    door = Door()
    for _ in range(3):
        door("POST", "/v1/completions", json=TEXT)
    assert len(door.controller.fleet.asked) == 1


def test_a_waiting_request_is_refused_once_no_replica_is_left() -> None:
    model = FakeModel()
    model.complete.seconds, model.complete.assigned = 60, False
    fleets = iter([FLEET, FLEET, FLEET])
    controller = FakeController()
    controller.fleet.answer = lambda: next(fleets, EMPTY)
    response = Door(model, controller)("POST", "/v1/completions", json=TEXT)
    assert (response.status_code, code_of(response)) == (503, "not_ready")
    assert model.complete.cancelled == 1
    assert len(controller.fleet.asked) >= 3


def test_a_request_waits_for_a_replica_that_drains() -> None:
    model = FakeModel()
    model.complete.seconds, model.complete.assigned = 0.2, False
    assert Door(model)("POST", "/v1/completions", json=TEXT).status_code == 200


def test_a_request_that_a_replica_runs_is_not_refused_although_the_fleet_looks_empty() -> None:
    model = FakeModel()
    model.complete.seconds = 0.2
    fleets = iter([FLEET])
    controller = FakeController()
    controller.fleet.answer = lambda: next(fleets, EMPTY)
    assert Door(model, controller)("POST", "/v1/completions", json=TEXT).status_code == 200


def test_requests_go_on_while_the_controller_does_not_answer() -> None:
    controller = FakeController(ray.exceptions.ActorDiedError())
    door = Door(controller=controller)
    assert door("POST", "/v1/completions", json=TEXT).status_code == 200


def test_a_request_whose_last_replica_died_is_503() -> None:
    model = FakeModel(ray.exceptions.ActorDiedError())
    fleets = iter([FLEET])
    controller = FakeController()
    controller.fleet.answer = lambda: next(fleets, EMPTY)
    door = Door(model, controller)
    door("POST", "/v1/completions", json=TEXT)
    response = door("POST", "/v1/completions", json=TEXT)
    assert response.status_code == 503
