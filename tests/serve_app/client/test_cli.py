"""`hotswap` against a fake fleet: in process through a fake transport, once over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from typer.testing import CliRunner, Result

from serve_app.client import cli
from serve_app.client.http import HotswapClient
from serve_app.rollout.plan import CanaryStep, Plan
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    FleetView,
    ReplicaView,
    RolloutList,
    RolloutView,
)
from tests.serve_app.gateway.fakes import Door, FakeController

OLD, NEW = "pirate@3f2a9c1d", "terse@9b1c22aa"
REFUSALS = {
    "/missing": (400, "adapter_not_found", "no adapter at\n/missing"),
    "/nowhere": (404, "no_such_rollout", "there is no such rollout"),
    "/undo": (409, "nothing_to_undo", "nothing was stable before"),
    "/taken": (409, "adapter_already_loaded", "bot@1 is loaded as 'bot'"),
}
HAPPY = ["pending", "staging", "progressing", "promoting", "succeeded"]
ENDS = {"succeeded", "aborted", "failed", "superseded"}


@dataclass
class FakeFleet:
    """The admin surface over one rollout that takes its next state whenever it is looked at."""

    states: list[str] = field(default_factory=lambda: list(HAPPY))
    outages: int = 0
    interrupt_at: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    rollout: RolloutView | None = None
    loaded: dict[str, AdapterView] = field(default_factory=dict)

    def answer(self, method: str, path: str, content: bytes) -> tuple[int, dict[str, Any]]:
        match method, path.removeprefix("/admin/").split("/"):
            case "GET", ["fleet"]:
                return 200, self.fleet().model_dump()
            case "GET", ["rollouts"]:
                ran = [self.rollout] if self.rollout else []
                return 200, RolloutList(data=ran).model_dump()
            case "GET", ["", "v1", "lora_adapters"]:
                listed = AdapterList(data=list(self.loaded.values()), generation=7)
                return 200, listed.model_dump()
            case "POST", ["", "v1", "load_lora_adapter"]:
                return self.load(json.loads(content))
            case "POST", ["", "v1", "unload_lora_adapter"]:
                self.asked.append(json.loads(content))
                return 200, self.loaded.pop(self.asked[-1]["lora_name"]).model_dump()
            case "GET", ["rollouts", "r1"] if self.rollout:
                return self.look()
            case "POST", ["rollouts"]:
                self.asked.append(json.loads(content))
                if self.asked[-1]["adapter"] == "missing":
                    return self.refuse("/missing")
                return 201, self.enter(self.states.pop(0)).model_dump()
            case "POST", ["rollouts", "r1", "abort"]:
                return 200, self.enter("aborting").model_dump()
            case "POST", ["rollouts", "r1", "promote" | "resume" | "retry" | "pause"]:
                return 200, self.enter(self.states.pop(0)).model_dump()
            case "POST", ["undo"]:
                if not self.rollout:
                    return self.refuse("/undo")
                return 201, self.enter(self.states.pop(0)).model_dump()
        return self.refuse("/nowhere")

    def load(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append(body)
        name = body["lora_name"]
        if name in self.loaded and not body["load_inplace"]:
            return self.refuse("/taken")
        self.loaded[name] = AdapterView(
            lora_name=name,
            lora_path=body["lora_path"],
            revision=f"{name}@3f2a9c1d",
            generation=7,
            ready=2,
            total=2,
        )
        return 200, self.loaded[name].model_dump()

    def look(self) -> tuple[int, dict[str, Any]]:
        if self.outages:
            self.outages -= 1
            return 503, {}
        assert self.rollout
        if self.rollout.state == self.interrupt_at:
            raise KeyboardInterrupt
        if self.states:
            self.enter(self.states.pop(0))
        return 200, self.rollout.model_dump()

    def enter(self, state: str) -> RolloutView:
        self.rollout = RolloutView(
            id="r1",
            target=NEW,
            previous=OLD,
            strategy="rolling",
            max_unavailable=1,
            state=state,
            reason="it took too long" if state in ("failed", "aborted") else None,
            total=2,
            created_at=1.0,
            ended_at=2.0 if state in ENDS else None,
        )
        return self.rollout

    def fleet(self) -> FleetView:
        return FleetView(
            ready=True,
            epoch=1,
            generation=2,
            stable=OLD,
            rollout=self.rollout,
            replicas=[ReplicaView(id="abc123", revision=OLD, assigned=OLD, serving=True)],
            history=["base@00000000", OLD],
            journal_uri="/tmp/journal",
        )

    def refuse(self, what: str) -> tuple[int, dict[str, Any]]:
        status, code, message = REFUSALS[what]
        return status, {"error": {"message": message, "type": "t", "param": None, "code": code}}

    def transport(self) -> httpx.MockTransport:
        def handle(request: httpx.Request) -> httpx.Response:
            self.tokens.add(request.headers.get("authorization"))
            status, body = self.answer(request.method, request.url.path, request.content)
            return httpx.Response(status, json=body)

        return httpx.MockTransport(handle)


PLAIN_TERMINAL = {"COLUMNS": "100", "FORCE_COLOR": None, "TTY_COMPATIBLE": None} | {
    "HOTSWAP_URL": None,
    "HOTSWAP_TOKEN": None,
}


def hotswap(fake: FakeFleet, *args: str, env: dict[str, str | None] | None = None) -> Result:
    def connect(url: str, *, token: str | None) -> HotswapClient:
        return HotswapClient(url, token=token, transport=fake.transport())

    env = PLAIN_TERMINAL | (env or {})
    return CliRunner().invoke(cli.app, list(args), obj=connect, env=env)


@contextmanager
def served(fake: FakeFleet) -> Iterator[str]:
    """The fake behind a real uvicorn on a free port; yields its address."""
    web = FastAPI()

    @web.api_route("/{path:path}", methods=["GET", "POST"])
    async def anything(request: Request, path: str) -> JSONResponse:
        status, body = fake.answer(request.method, f"/{path}", await request.body())
        return JSONResponse(body, status_code=status)

    config = uvicorn.Config(web, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # the socket listens already: an early request waits in its backlog, nobody has to poll
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


def test_status_shows_the_fleet_and_exits_0() -> None:
    result = hotswap(FakeFleet(), "status")
    assert result.exit_code == 0
    assert OLD in result.stdout
    assert "abc123" in result.stdout


def test_start_returns_once_accepted_and_says_how_to_watch() -> None:
    fake = FakeFleet()
    result = hotswap(fake, "rollout", "start", "--adapter", "org/pirate")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"r1  {OLD} → {NEW}  rolling  pending  0/2 committed, 0/2 staged",
        "watch: hotswap --url http://127.0.0.1:8000 rollout get r1 --watch",
    ]
    assert fake.asked == [{"adapter": "org/pirate"}], "what was not said is the server's to fill in"


def test_start_sends_every_option() -> None:
    fake = FakeFleet()
    options = ["--name", "n", "--strategy", "all_at_once", "--max-unavailable", "3"]
    options += ["--in-flight", "drain"]
    hotswap(fake, "rollout", "start", "--adapter", "x", *options)
    asked = {"adapter": "x", "name": "n", "strategy": "all_at_once", "max_unavailable": 3}
    assert fake.asked == [asked | {"in_flight": "drain"}]


# ---- plans --------------------------------------------------------------------------------------

PLAN = """
adapter: s3://models/support-bot/v7   # YAML, with words of its own
strategy: canary
steps:
  - {weight: 10, hold: 2m}
  - {weight: 50, hold: manual}
analysis:
  checks:
    - {metric: error_rate, max: 0.01}
"""
SENT = {
    "adapter": "s3://models/support-bot/v7",
    "strategy": "canary",
    "steps": [{"weight": 10.0, "hold": 120.0}, {"weight": 50.0, "hold": "manual"}],
    "analysis": {"checks": [{"metric": "error_rate", "max": 0.01}]},
}


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_plan_comes_from_a_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"plan.{kind}"
    file.write_text(PLAN if kind == "yaml" else json.dumps(yaml.safe_load(PLAN)))
    fake = FakeFleet()
    result = hotswap(fake, "rollout", "start", "--plan", str(file))
    assert (result.exit_code, fake.asked) == (0, [SENT])


def test_options_go_over_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN)
    fake = FakeFleet()
    over = ["--adapter", "org/other", "--step", "25:30s", "--step", "75"]
    over += ["--placement", "dedicated", "--progress-deadline", "5m", "--on-failure", "pause"]
    hotswap(fake, "rollout", "start", "--plan", str(file), *over)
    changed = {
        "adapter": "org/other",
        "steps": [{"weight": 25.0, "hold": 30.0}, {"weight": 75.0}],
        "placement": "dedicated",
        "progress_deadline": 300.0,
        "on_failure": "pause",
    }
    assert fake.asked == [SENT | changed]


def test_a_local_adapter_in_a_plan_is_sent_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pirate").mkdir()
    (tmp_path / "plan.yaml").write_text("adapter: pirate")
    monkeypatch.chdir(tmp_path)
    fake = FakeFleet()
    hotswap(fake, "rollout", "start", "--plan", "plan.yaml")
    assert fake.asked == [{"adapter": str(tmp_path / "pirate")}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: "),
        (b"adapter: [", "cannot be read: "),
        (b"\xff\xfe\x00", "cannot be read: "),
        (b"", "is no mapping of fields to values"),
        (b"- adapter", "is no mapping of fields to values"),
        (b"strategy: rolling", "adapter: Field required"),
        (b"adapter: x\nweight: 10", "weight: Extra inputs are not permitted"),
        (b"adapter: x\n10: 20", "10: "),
        (b"adapter: x\nprogress_deadline: soon", "progress_deadline: "),
        (b"adapter: x\nstrategy: canary", "plan: a canary needs steps"),
    ],
)
def test_a_bad_plan_exits_2_says_why_and_asks_nothing(
    tmp_path: Path, content: bytes | None, why: str
) -> None:
    file = tmp_path / "plan.yaml"
    if content is not None:
        file.write_bytes(content)
    fake = FakeFleet()
    result = hotswap(fake, "rollout", "start", "--plan", str(file))
    assert (result.exit_code, fake.tokens) == (2, set())
    assert why in " ".join(result.stderr.split())


@pytest.mark.parametrize("step", ["", "ten", "10:", "10:soon", "0", "101", "10:30s:1", ":30s"])
def test_a_bad_step_exits_2_and_asks_nothing(step: str) -> None:
    fake = FakeFleet()
    args = ["--adapter", "x", "--strategy", "canary", "--step", step]
    result = hotswap(fake, "rollout", "start", *args)
    assert (result.exit_code, fake.tokens) == (2, set())
    assert "steps.0" in result.stderr


@pytest.mark.parametrize("verb", ["promote", "resume", "retry"])
@pytest.mark.parametrize(("end", "code"), [("succeeded", 0), ("aborted", 3), ("failed", 3)])
def test_a_verb_that_is_watched_exits_as_its_rollout_ends(verb: str, end: str, code: int) -> None:
    fake = FakeFleet(states=["progressing", "progressing", end])
    fake.enter("paused")
    assert hotswap(fake, "rollout", verb, "r1", "--watch").exit_code == code


def test_pause_shows_the_rollout_that_it_paused() -> None:
    fake = FakeFleet(states=["paused"])
    fake.enter("progressing")
    result = hotswap(fake, "rollout", "pause", "r1")
    assert (result.exit_code, "paused" in result.stdout) == (0, True)


# ---- one script, four ways to say it ------------------------------------------------------------

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


def heard(controller: FakeController) -> dict[str, list[Any]]:
    """What the controller was asked, verb by verb."""
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
    def knock(request: httpx.Request) -> httpx.Response:
        answer = door(
            request.method, str(request.url), content=request.content, headers=request.headers
        )
        return httpx.Response(answer.status_code, content=answer.content)

    return httpx.MockTransport(knock)


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


@pytest.mark.parametrize("say", [by_handle, by_http, by_client, by_shell])
def test_however_it_is_said_the_controller_hears_the_same(say: Callable[[Door], None]) -> None:
    door = Door()
    say(door)
    said: dict[str, list[Any]] = {verb: [] for verb, _ in SCRIPT}
    for verb, more in SCRIPT:
        about = {"start_rollout": (STEPS,), "undo": ()}.get(verb, ("rollout-1",))
        said[verb].append((about, more))
    assert heard(door.controller) == said


# ---- adapters -----------------------------------------------------------------------------------


def test_adapters_are_loaded_listed_and_unloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bot").mkdir()
    monkeypatch.chdir(tmp_path)
    fake = FakeFleet()
    here = str(tmp_path / "bot")
    line = f"bot  bot@3f2a9c1d  2/2 serve it  {here}\ngeneration 7\n"
    loaded = hotswap(fake, "adapters", "load", "bot", "./bot", "--expected-generation", "6")
    assert (loaded.exit_code, loaded.stdout) == (0, line)
    assert hotswap(fake, "adapters", "list").stdout == line
    assert hotswap(fake, "adapters", "load", "bot", "s3://b/bot", "--in-place").exit_code == 0
    assert hotswap(fake, "adapters", "unload", "bot").exit_code == 0
    assert hotswap(fake, "adapters", "list").stdout == "no adapters are loaded\ngeneration 7\n"
    named = {"lora_name": "bot", "lora_path": here, "load_inplace": False}
    assert fake.asked == [
        named | {"expected_generation": 6},
        {"lora_name": "bot", "lora_path": "s3://b/bot", "load_inplace": True},
        {"lora_name": "bot"},
    ]


def test_a_name_that_is_taken_exits_1() -> None:
    fake = FakeFleet()
    hotswap(fake, "adapters", "load", "bot", "x")
    refused = hotswap(fake, "adapters", "load", "bot", "y")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == "error: bot@1 is loaded as 'bot' [adapter_already_loaded]\n"


@pytest.mark.parametrize("command", ["load other x", "unload bot", "list"])
def test_what_adapters_shows_is_there_as_json_too(command: str) -> None:
    fake = FakeFleet()
    hotswap(fake, "adapters", "load", "bot", "x")
    document = json.loads(hotswap(fake, "adapters", *command.split(), "--json").stdout)
    assert document["generation"] == 7


def test_a_local_adapter_is_sent_as_an_absolute_path_and_any_other_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pirate").mkdir()
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    fake = FakeFleet()
    for adapter in ("./pirate", "pirate/../pirate", "./absent", "s3://bucket/pirate", "base"):
        fake.states = ["pending"]
        hotswap(fake, "rollout", "start", "--adapter", adapter)
    here = str(tmp_path / "pirate")
    sent = [asked["adapter"] for asked in fake.asked]
    assert sent == [here, here, "./absent", "s3://bucket/pirate", "base"]


def test_a_watched_rollout_that_is_promoted_exits_0_and_prints_each_state_once() -> None:
    result = hotswap(FakeFleet(), "rollout", "start", "--adapter", "x", "--watch")
    assert result.exit_code == 0
    shown = [line.split("rolling  ")[1].split()[0] for line in result.stdout.splitlines()]
    assert shown == HAPPY[1:]


@pytest.mark.parametrize("end", ["aborted", "failed", "superseded"])
def test_a_watched_rollout_that_is_not_promoted_exits_3_with_the_reason(end: str) -> None:
    fake = FakeFleet(states=["pending", "progressing", end])
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--watch")
    why = "the server gave no reason" if end == "superseded" else "it took too long"
    assert result.exit_code == 3
    assert result.stderr == f"error: r1 to {NEW} was not promoted: {why} [{end}]\n"


def test_a_watch_lives_through_an_outage() -> None:
    fake = FakeFleet(states=["pending", "succeeded"], outages=2)
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--watch")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_terminal_sees_the_live_screen() -> None:
    fake = FakeFleet(states=["pending", "progressing", "succeeded"])
    args = ["rollout", "start", "--adapter", "x", "--watch"]
    result = hotswap(fake, *args, env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert result.exit_code == 0
    assert "abc123" in result.stdout
    assert "succeeded" in result.stdout


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_json_prints_one_document_only(watch: list[str]) -> None:
    fake = FakeFleet(states=["pending", "failed"])
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--json", *watch)
    assert fake.rollout
    assert RolloutView.model_validate_json(result.stdout) == fake.rollout
    assert result.exit_code == (3 if watch else 0)


@pytest.mark.parametrize("command", ["status", "history", "rollout list", "rollout get r1"])
def test_every_command_that_shows_something_has_json(command: str) -> None:
    fake = FakeFleet(states=[])
    fake.enter("progressing")
    result = hotswap(fake, *command.split(), "--json")
    assert result.exit_code == 0
    assert isinstance(json.loads(result.stdout), dict)


def test_get_list_abort_and_history_show_lines() -> None:
    fake = FakeFleet(states=[])
    fake.enter("progressing")
    assert hotswap(fake, "rollout", "get", "r1").stdout.startswith(f"r1  {OLD} → {NEW}")
    assert hotswap(fake, "rollout", "list").stdout.startswith(f"r1  {OLD} → {NEW}")
    assert "aborting" in hotswap(fake, "rollout", "abort", "r1").stdout
    assert hotswap(fake, "history").stdout == f"1  base@00000000\n2  {OLD}  stable\n"


def test_get_can_watch_a_rollout_that_was_started_before() -> None:
    fake = FakeFleet(states=["promoting", "succeeded"])
    fake.enter("progressing")
    assert hotswap(fake, "rollout", "get", "r1", "--watch").exit_code == 0
    assert fake.rollout
    assert fake.rollout.state == "succeeded"


def test_undo_watches_the_rollout_that_it_makes() -> None:
    fake = FakeFleet()
    fake.enter("succeeded")
    result = hotswap(fake, "undo", "--watch")
    assert result.exit_code == 0
    assert "succeeded" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["rollout", "start", "--adapter", "missing"],
            "no adapter at /missing [adapter_not_found]",
        ),
        (["undo"], "nothing was stable before [nothing_to_undo]"),
        (["rollout", "abort", "r9"], "there is no such rollout [no_such_rollout]"),
        (["rollout", "get", "r9", "--watch"], "there is no such rollout [no_such_rollout]"),
    ],
)
def test_a_refusal_exits_1_with_one_line(args: list[str], line: str) -> None:
    result = hotswap(FakeFleet(), *args)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {line}\n")


@pytest.mark.parametrize(
    "args",
    [
        ["rollout", "start"],
        ["rollout", "start", "--adapter", "x", "--strategy", "hope"],
        ["rollout", "start", "--adapter", "x", "--max-unavailable", "0"],
        ["rollout", "start", "--adapter", "x", "--in-flight", "pause"],
        ["adapters", "load", "bot"],
        ["adapters", "unload"],
        ["rollout", "abort", " "],
        ["--url", "localhost:8000", "status"],
        ["--token", "a\nb", "status"],
        ["dance"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_asks_nothing(args: list[str]) -> None:
    fake = FakeFleet()
    result = hotswap(fake, *args)
    assert (result.exit_code, fake.tokens) == (2, set())
    assert "Error: " in result.stderr


def test_the_address_and_the_token_come_from_the_environment_or_the_option() -> None:
    fake = FakeFleet()
    env: dict[str, str | None] = {"HOTSWAP_URL": "http://env.test", "HOTSWAP_TOKEN": "from-env"}
    start = ["rollout", "start", "--adapter", "x"]
    assert "--url http://env.test rollout" in hotswap(fake, *start, env=env).stdout
    given = ["--url", "http://opt.test", "--token", "from-option", *start]
    assert "--url http://opt.test rollout" in hotswap(fake, *given, env=env).stdout
    assert fake.tokens == {"Bearer from-env", "Bearer from-option"}


def test_ctrl_c_leaves_quietly_with_130_and_says_that_the_rollout_goes_on() -> None:
    fake = FakeFleet(interrupt_at="progressing")
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--watch")
    assert result.exit_code == 130
    assert result.stderr == "stopped; a rollout that was accepted goes on (hotswap status)\n"


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_watched_status_goes_on_until_ctrl_c(as_json: list[str]) -> None:
    class FakeFleetUntilCtrlC(FakeFleet):
        looks = 0

        def fleet(self) -> FleetView:
            self.looks += 1
            if self.looks == 3:
                raise KeyboardInterrupt
            return super().fleet()

    result = hotswap(FakeFleetUntilCtrlC(), "status", "--watch", *as_json)
    assert result.exit_code == 130
    assert result.stdout.count("abc123") == 1
    assert not as_json or FleetView.model_validate_json(result.stdout) == FakeFleet().fleet()


@pytest.mark.parametrize("command", ["", "rollout", "rollout start", "adapters", "status", "undo"])
def test_every_level_has_help(command: str) -> None:
    result = hotswap(FakeFleet(), *command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert "--help" in result.stdout


def test_help_documents_the_exit_codes_and_the_environment() -> None:
    text = hotswap(FakeFleet(), "--help").stdout
    for code in (0, 2, *cli.Exit):
        assert f"\n    {int(code):<4} " in text
    assert "HOTSWAP_URL" in text
    assert "HOTSWAP_TOKEN" in text


def test_version_is_printed() -> None:
    result = hotswap(FakeFleet(), "--version")
    assert (result.exit_code, result.stdout[:7]) == (0, "hotswap")


def run_module(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"NO_PROXY": "127.0.0.1", "PYTHONIOENCODING": "latin-1"}
    env.pop("FORCE_COLOR", None)
    command = [sys.executable, "-m", "serve_app.client.cli", *args]
    return subprocess.run(command, env=env, capture_output=True, encoding="latin-1", timeout=60)


def test_a_pipeline_runs_the_module_against_a_real_server() -> None:
    with served(FakeFleet()) as url:
        # latin-1 has no arrow: a poor locale must cost a character, not the exit code
        done = run_module("--url", url, "rollout", "start", "--adapter", "x", "--watch")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{OLD} ? {NEW}" in done.stdout
        assert "succeeded" in done.stdout
        refused = run_module("--url", url, "rollout", "get", "r9")
        assert refused.returncode == 1
        assert refused.stderr == "error: there is no such rollout [no_such_rollout]\n"


def test_nobody_at_the_address_exits_4_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = run_module("--url", url, "status", "--watch")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"error: cannot reach the server at {url}: ")
    assert done.stderr.endswith(" [unreachable]\n")
    assert done.stderr.count("\n") == 1
