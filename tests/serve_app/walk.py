"""The files that one chat request enters: gateway, serving and engine, over a tiny model."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import httpx
from transformers import AutoTokenizer

import serve_app
from serve_app.gateway.deployment import build_app
from serve_app.replica.serving_generate import GenerationServing
from serve_app.settings import Settings
from serve_app.wire.admin import FleetView
from tests.e2e.tiny_world import make_world
from tests.serve_app.generating import started

ROOT = Path(serve_app.__file__).parents[1]
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def files_of_a_chat_request(folder: Path) -> set[str]:
    """Paths from the root of the repository, of every file with a function that was called."""
    world = make_world(folder)
    settings = Settings(model=str(world.model), served_model_name="tiny")
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    entered: set[str] = set()

    def called(frame: FrameType, event: str, _argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT / "serve_app"):
            entered.add(str(file.relative_to(ROOT)))

    with contextmanager(started)(world, {}) as running:
        serving = GenerationServing(running.engine, tokenizer, settings, replica="r1")
        app = build_app(
            settings,
            model=handle(chat=serving.whole),
            controller=handle(fleet=a_fleet),
        )

        async def ask() -> None:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                await client.post("/v1/chat/completions", json=CHAT)  # builds what is built once
                sys.setprofile(called)  # of this thread: the event loop of gateway and replica
                try:
                    response = await client.post("/v1/chat/completions", json=CHAT)
                finally:
                    sys.setprofile(None)
            assert response.status_code == 200, response.text

        running(ask())
    return entered


def handle(**methods: Callable[..., Awaitable[Any]]) -> Any:
    """A DeploymentHandle whose methods run in this process."""
    named = {name: SimpleNamespace(remote=method) for name, method in methods.items()}
    return SimpleNamespace(**named)


async def a_fleet() -> FleetView:
    return FleetView.model_construct(ready=True, replicas=["r1"])
