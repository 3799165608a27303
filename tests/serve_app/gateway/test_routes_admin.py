"""The admin routes over fake handles: calls of the controller, preconditions, the token."""

from __future__ import annotations

from typing import Any

import pytest

from hotswap_lib import AdapterNotFound
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.plan import Plan
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    FleetView,
    RolloutList,
    RolloutView,
)
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterNotLoaded,
    Fenced,
    FleetNotReady,
    KeyReused,
    NothingToUndo,
    PlanImpossible,
    ProbeInvalid,
    RolloutNotFound,
)
from tests.serve_app.gateway.fakes import (
    ADAPTER,
    FLEET,
    ROLLOUT,
    TEXT,
    Door,
    FakeController,
    code_of,
)

ADMIN: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/admin/fleet", {}),
    ("GET", "/admin/rollouts", {}),
    ("GET", "/admin/rollouts/rollout-1", {}),
    ("POST", "/admin/rollouts", {"json": {"adapter": "org/pirate"}}),
    *(
        ("POST", f"/admin/rollouts/rollout-1/{verb}", {})
        for verb in ("promote", "abort", "pause", "resume", "retry")
    ),
    ("POST", "/admin/undo", {}),
    ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "terse", "lora_path": "/terse"}}),
    ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": "terse"}}),
    ("GET", "/v1/lora_adapters", {}),
]


def test_every_admin_route_is_in_the_table_above() -> None:
    paths = Door().app.openapi()["paths"]
    routes = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if path.startswith("/admin") or "lora" in path
    }
    assert routes == {(m, p.replace("rollout-1", "{id}")) for m, p, _ in ADMIN}


def test_the_fleet_and_the_rollouts_are_the_controllers_views() -> None:
    door = Door()
    assert FleetView.model_validate_json(door("GET", "/admin/fleet").text) == FLEET
    assert RolloutList.model_validate_json(door("GET", "/admin/rollouts").text).data == [ROLLOUT]
    assert RolloutView.model_validate_json(door("GET", "/admin/rollouts/x").text) == ROLLOUT
    assert door.controller.rollout.asked == [("x",)]


def test_starting_a_rollout_hands_the_plan_to_the_controller() -> None:
    door = Door()
    plan = {"adapter": "org/pirate", "strategy": "all_at_once", "max_unavailable": 2}
    response = door("POST", "/admin/rollouts", json=plan)
    assert response.status_code == 201
    assert RolloutView.model_validate_json(response.text) == ROLLOUT
    assert door.controller.start_rollout.asked == [(Plan.model_validate(plan),)]
    assert door.controller.start_rollout.named == [{}]
    path, headers = "/admin/rollouts?expected_generation=0", {"idempotency-key": "k"}
    assert door("POST", path, json=plan, headers=headers).status_code == 201
    assert door.controller.start_rollout.named[1] == {"expected_generation": 0, "key": "k"}


CONTROL = [
    ("/admin/rollouts/rollout-1/promote", "promote", ("rollout-1",), {"full": False}),
    ("/admin/rollouts/rollout-1/abort", "abort", ("rollout-1",), {}),
    ("/admin/rollouts/rollout-1/pause", "pause", ("rollout-1",), {}),
    ("/admin/rollouts/rollout-1/resume", "resume", ("rollout-1",), {}),
    ("/admin/rollouts/rollout-1/retry", "retry", ("rollout-1",), {}),
    ("/admin/undo", "undo", (), {"to": None}),
]


@pytest.mark.parametrize(("path", "verb", "arguments", "more"), CONTROL)
def test_a_verb_reaches_the_controller_with_its_key_and_the_generation_that_was_seen(
    path: str, verb: str, arguments: tuple[str, ...], more: dict[str, Any]
) -> None:
    door = Door()
    assert door("POST", path).is_success
    headers = {"idempotency-key": "nightly 7"}
    assert door("POST", f"{path}?expected_generation=4", headers=headers).is_success
    method = getattr(door.controller, verb)
    assert method.asked == [arguments, arguments]
    assert method.named == [
        more,
        more | {"expected_generation": 4, "key": "nightly 7"},
    ]


def test_a_full_promotion_and_an_undo_to_a_revision_say_so_in_the_query() -> None:
    door = Door()
    assert door("POST", "/admin/rollouts/rollout-1/promote?full=true").status_code == 200
    assert door.controller.promote.named[0]["full"] is True
    assert door("POST", "/admin/undo", params={"to": "pirate@11111111"}).status_code == 201
    assert door.controller.undo.named[0]["to"] == "pirate@11111111"


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?expected_generation=new", {}),
        ("?expected_generation=", {}),
        ("", {"idempotency-key": ""}),
        ("", {"idempotency-key": "k" * 257}),
    ],
)
def test_an_invalid_precondition_is_refused_and_not_ignored(
    query: str, headers: dict[str, str]
) -> None:
    door = Door()
    for path, verb, *_ in CONTROL:
        response = door("POST", f"{path}{query}", headers=headers)
        assert (response.status_code, code_of(response)) == (400, "invalid_parameter")
        assert getattr(door.controller, verb).asked == []


def test_loading_and_unloading_reach_the_controller_with_every_field() -> None:
    door = Door()
    load = {"lora_name": "terse", "lora_path": "/terse", "load_inplace": True}
    response = door("POST", "/v1/load_lora_adapter", json=load | {"expected_generation": 4})
    assert AdapterView.model_validate_json(response.text) == ADAPTER
    assert door.controller.load_adapter.asked == [("terse", "/terse")]
    named = [{"load_inplace": True, "expected_generation": 4}]
    assert door.controller.load_adapter.named == named
    assert door("POST", "/v1/unload_lora_adapter", json={"lora_name": "terse"}).is_success
    assert door.controller.unload_adapter.asked == [("terse",)]
    assert door.controller.unload_adapter.named == [{}]


def test_the_loaded_adapters_come_with_the_generation_of_the_fleet() -> None:
    listed = AdapterList.model_validate_json(Door()("GET", "/v1/lora_adapters").text)
    assert (listed.data, listed.generation) == ([ADAPTER], 4)


def test_a_plan_with_an_unknown_field_never_reaches_the_controller() -> None:
    door = Door()
    response = door("POST", "/admin/rollouts", json={"adapter": "x", "weight": 5})
    assert (response.status_code, code_of(response)) == (400, "unsupported_parameter")
    assert door.controller.start_rollout.asked == []


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (AdapterNotFound("x", None, "gone"), 400, "adapter_not_found"),
        (RolloutNotFound("rollout-1"), 404, "rollout_not_found"),
        (NothingToUndo(), 409, "nothing_to_undo"),
        (IllegalEvent("a rollout", "no"), 409, "illegal_event"),
        (GenerationMismatch(3, 4), 409, "generation_mismatch"),
        (AdapterAlreadyLoaded("terse", "terse@1", "terse@2"), 409, "adapter_already_loaded"),
        (AdapterNotLoaded("terse"), 404, "adapter_not_loaded"),
        (FleetNotReady(), 503, "fleet_not_ready"),
        (Fenced(3, 4), 503, "controller_replaced"),
        (PlanImpossible("no"), 400, "plan_impossible"),
        (ProbeInvalid("a:b", "is not there"), 400, "probe_invalid"),
        (KeyReused("k"), 409, "idempotency_key_reused"),
    ],
)
def test_an_error_of_the_controller_keeps_its_code(
    fault: Exception, status: int, code: str
) -> None:
    door = Door(controller=FakeController(fault))
    for method, path, more in ADMIN:
        response = door(method, path, **more)
        assert (response.status_code, code_of(response)) == (status, code)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic secret", "Bearer secre"]
)
@pytest.mark.parametrize(("method", "path", "more"), ADMIN)
def test_admin_routes_are_closed_without_the_token(
    method: str, path: str, more: dict[str, Any], header: str | None
) -> None:
    door = Door(admin_token="secret")
    headers = {} if header is None else {"authorization": header}
    response = door(method, path, headers=headers, **more)
    assert (response.status_code, code_of(response)) == (401, "not_authorized")
    assert response.headers["www-authenticate"] == "Bearer"
    asked = [one.asked for one in vars(door.controller).values()]
    assert asked == [[]] * len(asked)


@pytest.mark.parametrize(("method", "path", "more"), ADMIN)
def test_admin_routes_are_open_with_the_token_or_when_there_is_none(
    method: str, path: str, more: dict[str, Any]
) -> None:
    headers = {"authorization": "Bearer secret"}
    assert Door(admin_token="secret")(method, path, headers=headers, **more).is_success
    assert Door()(method, path, **more).is_success


def test_the_token_alone_without_its_scheme_is_not_enough() -> None:
    response = Door(admin_token="secret")(
        "GET", "/admin/fleet", headers={"authorization": "secret"}
    )
    assert response.status_code == 401


def test_the_scheme_may_be_written_in_any_case() -> None:
    headers = {"authorization": "bearer secret"}  # RFC 9110, 11.1
    assert Door(admin_token="secret")("GET", "/admin/fleet", headers=headers).is_success


def test_inference_needs_no_token() -> None:
    assert Door(admin_token="secret")("POST", "/v1/completions", json=TEXT).status_code == 200
