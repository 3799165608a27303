"""A transport that plays a script in place of a server."""

from __future__ import annotations

import time

import httpx

from serve_app.client.http import HotswapClient
from serve_app.wire.admin import ErrorBody, ErrorDetail, FleetView, View

URL = "http://fleet.test:8000"

FLEET = FleetView(ready=True, epoch=1, generation=4, stable="a@11111111", journal_uri="/j")


def answer(view: View, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=view.model_dump())


def rejection(status: int, code: str, message: str = "no") -> httpx.Response:
    return answer(ErrorBody(error=ErrorDetail(message=message, code=code)), status)


def away() -> Exception:
    return httpx.ConnectError("Connection refused")


class ScriptedServer(httpx.BaseTransport):
    """Plays its steps in order, repeats the last one, and records the requests."""

    def __init__(self, *steps: httpx.Response | Exception, delay_s: float = 0) -> None:
        self.steps = list(steps)
        self.delay_s = delay_s
        self.asked: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        time.sleep(self.delay_s)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        # a response object is spent once it is read; a script may repeat its last one
        return httpx.Response(step.status_code, headers=step.headers, content=step.content)


def client_of(server: ScriptedServer, *, token: str | None = None) -> HotswapClient:
    return HotswapClient(URL, token=token, transport=server)
