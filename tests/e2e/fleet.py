"""A running application as the tests see it: its client, its clients, its processes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
import psutil

from serve_app.client import HotswapClient
from serve_app.rollout.plan import InFlight, Plan, Strategy
from serve_app.wire.admin import ErrorBody, FleetView, ReplicaView

from .tiny_world import TinyWorld


def eventually(check: Callable[[], Any], *, within_s: float = 60, what: str = "it") -> Any:
    """The first truthy value of `check`; fails after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            if value := check():
                return value
        except Exception as error:
            last: object = error
        else:
            last = value
        assert time.monotonic() < deadline, f"{what} did not happen in {within_s} s: {last}"
        time.sleep(0.05)


def code_of(response: httpx.Response) -> str:
    """The code in OpenAI's envelope, which every error has."""
    return ErrorBody.model_validate_json(response.text).error.code


@dataclass(frozen=True, slots=True)
class Answer:
    revision: str
    replica: str
    prompt_ids: list[int]
    token_ids: list[int]
    max_tokens: int


@dataclass
class Fleet:
    """One deployed application."""

    url: str
    app: str
    world: TinyWorld
    token: str | None = None  # for the admin routes
    client: HotswapClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = HotswapClient(self.url, token=self.token)

    def ask(self, text: str, *, max_tokens: int = 8, model: str | None = None) -> Answer:
        """One greedy chat; raises for anything but 200."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "return_token_ids": True,
        }
        response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
        response.raise_for_status()
        document = response.json()
        assert response.headers["x-adapter-revision"] == document["system_fingerprint"]
        return Answer(
            revision=document["system_fingerprint"],
            replica=response.headers["x-replica-id"],
            prompt_ids=document["prompt_token_ids"],
            token_ids=document["choices"][0]["token_ids"],
            max_tokens=max_tokens,
        )

    def post(
        self,
        body: dict[str, Any],
        *,
        path: str = "/v1/completions",
        headers: dict[str, str] | None = None,
        timeout_s: float = 120,
    ) -> httpx.Response:
        """Whatever the answer is."""
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=timeout_s)

    @contextmanager
    def streaming(self, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        """The lines of a stream that has begun. Whoever leaves the context leaves the stream."""
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120) as response:
            assert response.status_code == 200, response.read()
            lines = response.iter_lines()  # to be kept: without it the connection is closed
            yield itertools.chain([next(lines)], lines)

    @cached_property
    def steady(self) -> str:
        """A prompt whose greedy answer does not end within its first 60 tokens."""
        for prompt in (f"go on {i}" for i in range(50)):
            answer = self.post({"prompt": prompt, "max_tokens": 60, "temperature": 0})
            if answer.json()["choices"][0]["finish_reason"] == "length":
                return prompt
        raise AssertionError("every answer ended")

    def running(self) -> int:
        return sum(replica.running for replica in self.client.fleet().replicas)

    def until_running(self, many: int) -> None:
        """Until so many requests are in generation."""
        eventually(lambda: self.running() == many, what=f"{many} running requests")

    def is_exact(self, answer: Answer) -> bool:
        want = self.world.expected(answer.revision, answer.prompt_ids, answer.max_tokens)
        return answer.token_ids == want

    def roll(
        self, name: str, *, strategy: Strategy = "rolling", in_flight: InFlight | None = None
    ) -> str:
        """Move the fleet to an adapter and wait; returns its revision."""
        plan = Plan(adapter=str(self.world.adapter(name)), strategy=strategy, in_flight=in_flight)
        rollout = self.client.start(plan)
        ended = self.client.wait(rollout.id, timeout_s=60)
        assert ended.state == "succeeded", ended
        return ended.target

    def settle(self, *, replicas: int) -> FleetView:
        """The fleet once so many replicas serve what they are assigned."""

        def settled() -> FleetView | None:
            fleet = self.client.fleet()
            good = [r for r in fleet.replicas if r.serving and r.revision == r.assigned]
            return fleet if len(good) == replicas == len(fleet.replicas) else None

        found: FleetView = eventually(settled, within_s=120, what=f"{replicas} serving replicas")
        return found

    def replica(self, pid: int) -> ReplicaView | None:
        return next((r for r in self.client.fleet().replicas if r.pid == pid), None)

    def process(self, deployment: str) -> psutil.Process:
        """The worker process of a one-replica deployment, found by the title Ray gives it."""
        return _titled(f"ServeReplica:{self.app}:{deployment}")

    def proxy(self) -> psutil.Process:
        """What all clients of the cluster are connected to."""
        return _titled("ProxyActor")


def _titled(title: str) -> psutil.Process:
    """Of this session's cluster: there may be others on the machine."""
    ours = psutil.Process().children(recursive=True)
    found = [p for p in ours if title in " ".join(_cmdline(p))]
    assert len(found) == 1, found
    return found[0]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


class Load:
    """Steady clients. Use as a context; afterwards `answers` and `failures` tell what they got."""

    def __init__(self, fleet: Fleet, *, clients: int = 4, max_tokens: int = 8) -> None:
        self.answers: list[Answer] = []
        self.failures: list[BaseException] = []
        self._fleet = fleet
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=120)

    def wait_for(self, more: int) -> None:
        """Until so many more answers have come."""
        goal = len(self.answers) + more
        eventually(lambda: len(self.answers) >= goal, what=f"{more} more answers")

    def mismatched(self) -> list[Answer]:
        return [answer for answer in self.answers if not self._fleet.is_exact(answer)]

    def _run(self, number: int) -> None:
        asked = 0
        while not self._stop.is_set():
            asked += 1
            try:
                question = f"question {(number + asked) % 5}"
                self.answers.append(self._fleet.ask(question, max_tokens=self._max_tokens))
            except Exception as error:
                self.failures.append(error)
                self._stop.wait(0.05)
