"""The summary of `serve run`: logged once, when all replicas serve, with commands that work."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from serve_app.controller import summary as module
from serve_app.controller.summary import log_summary_when_ready, summary
from serve_app.settings import Settings
from serve_app.wire.admin import FleetView, ReplicaView

URL = "http://127.0.0.1:8000"


def fleet(replicas: int = 2) -> FleetView:
    return FleetView(
        ready=True,
        epoch=1,
        generation=1,
        stable="pirate@1234abcd",
        replicas=[
            ReplicaView(
                id=f"r{i}", revision="pirate@1234abcd", assigned="pirate@1234abcd", serving=True
            )
            for i in range(replicas)
        ],
        journal_uri="s3://bucket/hotswap/journal.json",
    )


def lines(url: str | None = URL, **settings: Any) -> list[str]:
    return summary(Settings(**settings), fleet(), app="default", url=url).splitlines()


def commands(**settings: Any) -> tuple[list[str], list[str]]:
    """The words of the two commands at the end."""
    url = settings.pop("url", URL)
    curl, hotswap = lines(url, **settings)[-2:]
    return shlex.split(curl.removeprefix("  try")), shlex.split(hotswap)


def test_it_has_the_address_the_model_the_revision_the_envelope_and_the_journal() -> None:
    assert lines(state_uri="s3://bucket", max_rank=8, use_dora=True, task="embed")[:-2] == [
        "application 'default' is ready: 2 replicas serve pirate@1234abcd",
        "  URL       http://127.0.0.1:8000",
        "  model     SmolLM2-135M-Instruct (model=embedded)",
        "  revision  pirate@1234abcd",
        "  adapters  rank up to 8 on all-linear, use_dora",
        "  journal   s3://bucket/hotswap/journal.json",
    ]


def test_generating_replicas_have_lanes_and_a_journal_on_a_nodes_disk_says_so() -> None:
    text = "\n".join(lines(lanes=3, kv_cache_tokens=4096))
    assert "lanes     3 for each replica, each with 4096 KV cache tokens" in text
    assert "journal.json (on this node's disk only; state_uri moves it)" in text


def test_the_next_commands_can_be_pasted() -> None:
    curl, hotswap = commands()
    assert curl[:2] == ["curl", f"{URL}/v1/chat/completions"]
    assert json.loads(curl[-1])["model"] == "SmolLM2-135M-Instruct"
    assert hotswap[:4] == ["hotswap", "rollout", "start", "--adapter"]
    assert Path(hotswap[4], "adapter_config.json").is_file()
    assert hotswap[5:] == ["--watch"]


def test_another_address_is_in_both_commands() -> None:
    curl, hotswap = commands(url="http://127.0.0.1:9000/llm")
    assert curl[1] == "http://127.0.0.1:9000/llm/v1/chat/completions"
    assert hotswap[:3] == ["hotswap", "--url", "http://127.0.0.1:9000/llm"]


@pytest.mark.parametrize(
    ("task", "route"),
    [
        ("auto", "models"),
        ("generate", "completions"),
        ("embed", "embeddings"),
        ("classify", "classify"),
    ],
)
def test_the_request_is_one_that_the_task_answers(task: str, route: str) -> None:
    curl, hotswap = commands(model="org/model", task=task)
    assert curl[1] == f"{URL}/v1/{route}"
    assert hotswap[4] == "ADAPTER"


def test_without_an_http_proxy_there_is_no_command_to_try() -> None:
    text = "\n".join(lines(None))
    assert "URL       none: Serve runs no HTTP proxy" in text
    assert "curl" not in text


def test_it_is_logged_once_serve_has_all_replicas(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def status() -> Any:
        asked.append("status")
        now = ["DEPLOYING", "DEPLOYING", "RUNNING"][len(asked) - 1]
        return SimpleNamespace(applications={"default": SimpleNamespace(status=now)})

    async def view() -> FleetView:
        return fleet()

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(module, "http_url", lambda _app: URL)
    monkeypatch.setattr(module, "_POLL_S", 0.001)
    with caplog.at_level(logging.INFO, logger="serve_app"):
        asyncio.run(log_summary_when_ready("default", Settings(), view))
    assert len(asked) == 3
    [record] = [r for r in caplog.records if "is ready" in r.message]
    assert vars(record)["revision"] == "pirate@1234abcd"
