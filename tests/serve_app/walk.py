"""The files that one chat request enters: gateway, serving and engine, over a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from transformers import AutoTokenizer

import serve_app
from serve_app.gateway.routes import Gateway
from serve_app.openai.requests import ChatRequest
from serve_app.replica.serving_generate import GenerationServing
from tests.e2e.tiny_world import make_world
from tests.serve_app.gateway.test_routes import Call, FakeController
from tests.serve_app.generating import Running

ROOT = Path(serve_app.__file__).parents[1]
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


class Replica:
    """A handle whose requests run in this process, without Ray between."""

    def __init__(self, running: Running) -> None:
        tokenizer = AutoTokenizer.from_pretrained(running.world.model)
        settings = running.engine.settings
        self._serving = GenerationServing(running.engine, tokenizer, settings, replica="r1")
        self.chat = self

    def remote(self, request: ChatRequest, pin: str | None, session: str | None) -> Call:
        return Call(self._serving.whole(request, pin, session))


def files_of_a_chat_request(folder: Path) -> set[str]:
    """Paths from the root of the repository, of every file with a function that was called."""
    running = Running(make_world(folder), images={})
    running.engine.admission.open()
    entered: set[str] = set()

    def called(frame: FrameType, event: str, _argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT / "serve_app"):
            entered.add(str(file.relative_to(ROOT)))

    async def ask() -> None:
        model: Any = Replica(running)
        controller: Any = FakeController()
        app = Gateway(running.engine.settings, model=model, controller=controller).app()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            sys.setprofile(called)  # of this thread: the event loop of gateway and replica
            try:
                response = await client.post("/v1/chat/completions", json=CHAT)
            finally:
                sys.setprofile(None)
        assert response.status_code == 200, response.text

    try:
        running(ask())
    finally:
        running.close()
    return entered
