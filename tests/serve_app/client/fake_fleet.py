"""A fake fleet for `hotswap`: in process through a fake transport, or over a real socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from typer.testing import CliRunner, Result

from serve_app.client import cli
from serve_app.client.http import HotswapClient
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    FleetView,
    ReplicaView,
    RolloutList,
    RolloutView,
)

OLD, NEW = "pirate@3f2a9c1d", "terse@9b1c22aa"

REJECTIONS = {
    "/missing": (400, "adapter_not_found", "no adapter at\n/missing"),
    "/nowhere": (404, "no_such_rollout", "there is no such rollout"),
    "/undo": (409, "nothing_to_undo", "nothing was stable before"),
    "/taken": (409, "adapter_already_loaded", "bot@1 is loaded as 'bot'"),
}

HAPPY = ["pending", "staging", "progressing", "promoting", "succeeded"]

ENDS = {"succeeded", "aborted", "failed", "superseded"}


@dataclass
class FakeFleet:
    """The admin API of a fleet whose one rollout takes its next state at every look."""

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
                    return self.reject("/missing")
                return 201, self.enter(self.states.pop(0)).model_dump()
            case "POST", ["rollouts", "r1", "abort"]:
                return 200, self.enter("aborting").model_dump()
            case "POST", ["rollouts", "r1", "promote" | "resume" | "retry" | "pause"]:
                return 200, self.enter(self.states.pop(0)).model_dump()
            case "POST", ["undo"]:
                if not self.rollout:
                    return self.reject("/undo")
                return 201, self.enter(self.states.pop(0)).model_dump()
        return self.reject("/nowhere")

    def load(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append(body)
        name = body["lora_name"]
        if name in self.loaded and not body["load_inplace"]:
            return self.reject("/taken")
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

    def reject(self, what: str) -> tuple[int, dict[str, Any]]:
        status, code, message = REJECTIONS[what]
        return status, {"error": {"message": message, "type": "t", "param": None, "code": code}}

    def transport(self) -> httpx.MockTransport:
        def respond(request: httpx.Request) -> httpx.Response:
            self.tokens.add(request.headers.get("authorization"))
            status, body = self.answer(request.method, request.url.path, request.content)
            return httpx.Response(status, json=body)

        return httpx.MockTransport(respond)


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
        # the socket listens already: an early request waits in its backlog
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "uvicorn did not stop within 20 s"
