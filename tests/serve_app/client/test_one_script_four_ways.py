"""The same requests by handle, HTTP, client and shell: the controller receives the same calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from serve_app.client import cli
from serve_app.client.http import HotswapClient
from serve_app.rollout.plan import CanaryStep, Plan
from tests.serve_app.client.fake_fleet import PLAIN_TERMINAL
from tests.serve_app.gateway.fakes import Door, FakeController

SCRIPT: list[tuple[str, dict[str, Any]]] = [
    ("start_rollout", {"expected_generation": 4, "key": "nightly 7"}),
    ("promote", {"full": False}),
    ("promote", {"full": True, "expected_generation": 0, "key": "p"}),
    ("pause", {"expected_generation": 5}),
    ("resume", {"key": "r"}),
    ("retry", {"expected_generation": 6, "key": "t"}),
    ("abort", {"key": "a/b"}),
    ("undo", {"to": "pirate@11111111", "expected_generation": 7, "key": "u"}),
    ("undo", {"to": None}),
]

STEPS = Plan(
    adapter="org/x",
    strategy="canary",
    steps=(CanaryStep(weight=10, hold=60), CanaryStep(weight=50)),
)


def received(controller: FakeController) -> dict[str, list[Any]]:
    """The calls that the controller received, by verb."""
    verbs = dict.fromkeys(verb for verb, _ in SCRIPT)
    methods = {verb: getattr(controller, verb) for verb in verbs}
    return {
        verb: list(zip(method.asked, method.named, strict=True)) for verb, method in methods.items()
    }


def by_handle(door: Door) -> None:
    async def ask(verb: str, more: dict[str, Any]) -> None:
        about = {"start_rollout": (STEPS,), "undo": ()}.get(verb, ("rollout-1",))
        await getattr(door.controller, verb).remote(*about, **more)

    for verb, more in SCRIPT:
        asyncio.run(ask(verb, more))


def by_http(door: Door) -> None:
    for verb, more in SCRIPT:
        query = {k: str(v) for k, v in more.items() if k != "key" and v is not None}
        headers = {"idempotency-key": more["key"]} if "key" in more else {}
        path = {"start_rollout": "/admin/rollouts", "undo": "/admin/undo"}.get(
            verb, f"/admin/rollouts/rollout-1/{verb}"
        )
        body = {"json": STEPS.model_dump(mode="json")} if verb == "start_rollout" else {}
        assert door("POST", path, params=query, headers=headers, **body).is_success


def through(door: Door) -> httpx.MockTransport:
    def respond(request: httpx.Request) -> httpx.Response:
        answer = door(
            request.method, str(request.url), content=request.content, headers=request.headers
        )
        return httpx.Response(answer.status_code, content=answer.content)

    return httpx.MockTransport(respond)


def by_client(door: Door) -> None:
    with HotswapClient("http://door", transport=through(door)) as client:
        for verb, more in SCRIPT:
            match verb:
                case "start_rollout":
                    client.start(STEPS, **more)
                case "undo":
                    client.undo(**more)
                case _:
                    getattr(client, verb)("rollout-1", **more)


def by_shell(door: Door) -> None:
    def connect(_url: str, *, token: str | None) -> HotswapClient:
        return HotswapClient("http://door", token=token, transport=through(door))

    for verb, more in SCRIPT:
        words = {"undo": ["undo"]}.get(verb, ["rollout", verb, "rollout-1"])
        if verb == "start_rollout":
            words = ["rollout", "start", "--adapter", "org/x", "--strategy", "canary"]
            words += ["--step", "10:1m", "--step", "50"]
        for name, value in more.items():
            option = {"key": "--idempotency-key"}.get(name, f"--{name.replace('_', '-')}")
            if value is not None and value is not False:
                words += [option] if value is True else [option, str(value)]
        result = CliRunner().invoke(cli.app, words, obj=connect, env=PLAIN_TERMINAL)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("send", [by_handle, by_http, by_client, by_shell])
def test_the_controller_receives_the_same_calls_whichever_way_they_come(
    send: Callable[[Door], None],
) -> None:
    door = Door()
    send(door)
    expected: dict[str, list[Any]] = {verb: [] for verb, _ in SCRIPT}
    for verb, more in SCRIPT:
        about = {"start_rollout": (STEPS,), "undo": ()}.get(verb, ("rollout-1",))
        expected[verb].append((about, more))
    assert received(door.controller) == expected
