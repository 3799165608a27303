"""The summary that `serve run` shows once an application is ready to use.

The controller logs it: it knows the replicas and the journal, and Serve knows the address.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ray import serve

from serve_app.settings import EMBEDDED, Settings
from serve_app.wire.admin import FleetView
from serve_app.wire.errors import Fenced
from serve_app.wire.ray_internals import http_url

logger = logging.getLogger(__name__)
_POLL_S = 1.0
_CLIENT_URL = "http://127.0.0.1:8000"  # the default of the `hotswap` command
_PIRATE = Path(__file__).parents[1] / "adapters" / "pirate"


async def log_summary_when_ready(
    app: str, settings: Settings, fleet: Callable[[], Awaitable[FleetView]]
) -> None:
    """Waits until all declared replicas of `app` serve, then logs one summary."""
    while True:
        try:
            status = (await asyncio.to_thread(serve.status)).applications.get(app)
            if status is not None and status.status == "RUNNING":
                url = await asyncio.to_thread(http_url, app)
                view = await fleet()
                break
        except Fenced:
            return  # the other controller logs it
        except Exception:  # Serve's controller may be away; a summary must not fail anything
            logger.debug("no summary yet", exc_info=True)
        await asyncio.sleep(_POLL_S)
    text = summary(settings, view, app=app, url=url)
    logger.info(text, extra={"revision": view.stable})


def summary(settings: Settings, view: FleetView, *, app: str, url: str | None) -> str:
    """Returns the lines of the summary. `url` is None where Serve runs no HTTP proxy."""
    serving = sum(replica.serving for replica in view.replicas)
    rows = {
        "URL": url or "none: Serve runs no HTTP proxy",
        "model": f"{settings.model_name} (model={settings.model})",
        "revision": view.stable,
        "adapters": _envelope(settings),
        "lanes": _lanes(settings),
        "journal": view.journal_uri
        + ("" if settings.state_uri else " (on this node's disk only; state_uri moves it)"),
        "try": "\n            ".join(_commands(settings, url)) if url else "",
    }
    lines = [f"  {name:<9} {value}" for name, value in rows.items() if value]
    replicas = "1 replica serves" if serving == 1 else f"{serving} replicas serve"
    return "\n".join([f"application {app!r} is ready: {replicas} {view.stable}", *lines])


def _envelope(settings: Settings) -> str:
    parts = [f"rank up to {settings.max_rank} on {settings.target_modules}"]
    if settings.modules_to_save:
        parts.append(f"modules_to_save={settings.modules_to_save}")
    parts += [name for name in ("use_dora", "lora_bias") if getattr(settings, name)]
    if settings.bias != "none":
        parts.append(f"bias={settings.bias}")
    return ", ".join(parts)


def _lanes(settings: Settings) -> str:
    if settings.task in ("embed", "classify"):
        return ""
    return f"{settings.lanes} for each replica, each with {settings.lane_tokens} KV cache tokens"


def _commands(settings: Settings, url: str) -> list[str]:
    option = "" if url == _CLIENT_URL else f"--url {url} "
    adapter = str(_PIRATE) if settings.model == EMBEDDED else "ADAPTER"
    return [_curl(settings, url), f"hotswap {option}rollout start --adapter {adapter} --watch"]


def _curl(settings: Settings, url: str) -> str:
    """Returns a request that the model can answer, as far as the settings say."""
    body: dict[str, Any] = {"model": settings.model_name}
    if settings.model == EMBEDDED:
        route = "chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    elif settings.task == "auto":
        return f"curl {url}/v1/models"
    elif settings.task == "generate":
        route = "completions"
        body["prompt"] = "The capital of France is"
    else:
        route = "embeddings" if settings.task == "embed" else "classify"
        body["input"] = "The capital of France is Paris."
    return f"curl {url}/v1/{route} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
