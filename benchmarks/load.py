"""Load with fixed seeds: prompts, arrival times, clients, and samples of their answers.

``python -m benchmarks.load`` runs the clients over HTTP in their own process: it reads one JSON
document (`Job`) from standard input, and writes a line for each answer. Imports neither torch nor
ray, so that it starts at once. Times are seconds since the epoch, so that another process can
match requests with swaps.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import httpx

PROMPT_TOKENS = (24, 100)  # in a prompt: lowest, highest
LOWEST_ID = 20  # lower token ids are special in the embedded model
TIMEOUT_S = 300.0

Body = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request. `due_at`: its planned time. `error`: the reason if it has no answer."""

    index: int
    due_at: float
    ended_at: float
    first_at: float | None = None  # of a stream: the time of the first event
    tokens: int = 0
    revision: str = ""
    token_ids: tuple[int, ...] = ()
    error: str | None = None

    @property
    def latency_s(self) -> float:
        """From the planned time, so that a client delayed by slow answers does not hide them."""
        return self.ended_at - self.due_at

    @property
    def first_token_s(self) -> float:
        return (self.first_at or self.ended_at) - self.due_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Requests over HTTP. Without `due_s`, each of `clients` waits for its answer (a closed loop).

    `due_s`: for each body, the seconds after the start at which it is sent, however many requests
    are running (an open loop). `endless`: repeat the bodies until standard input ends.
    """

    url: str
    bodies: list[Body]
    stream: bool
    clients: int = 1
    due_s: list[float] | None = None
    endless: bool = False


Ask = Callable[[int, Body, float], Awaitable[Sample]]
"""(index, body, due_at) → the answer; never raises for a request that failed."""


def prompts(seed: int, number: int, *, vocabulary: int, salt: str = "") -> list[list[int]]:
    """Random token ids of mixed lengths; no two prompts share a prefix that a cache could match.

    `salt`: selects other tokens of the same lengths, so that the next measurement of the same
    engine finds nothing in its cache.
    """
    lengths, ids = random.Random(seed), random.Random(f"{seed} {salt}")
    return [
        [ids.randrange(LOWEST_ID, vocabulary) for _ in range(lengths.randint(*PROMPT_TOKENS))]
        for _ in range(number)
    ]


def completions(asked: Iterable[list[int]], *, max_tokens: int) -> list[Body]:
    return [{"prompt": ids, "max_tokens": max_tokens, "temperature": 0} for ids in asked]


def arrivals(seed: int, *, per_second: float, seconds: float) -> list[float]:
    """Poisson arrivals: the planned time of each, in seconds after the start."""
    order = random.Random(seed)
    due, at = [], order.expovariate(per_second)
    while at < seconds:
        due.append(at)
        at += order.expovariate(per_second)
    return due


async def closed_loop(
    ask: Ask, bodies: Sequence[Body], *, clients: int, stop: threading.Event | None = None
) -> list[Sample]:
    """Each client sends its next request after its answer; with `stop`, until that is set."""
    numbers = count()
    samples: list[Sample] = []

    async def client() -> None:
        for number in numbers:
            if stop.is_set() if stop else number >= len(bodies):
                return
            samples.append(await ask(number, bodies[number % len(bodies)], time.time()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return samples


async def open_loop(ask: Ask, bodies: Sequence[Body], due_s: Sequence[float]) -> list[Sample]:
    began_at = time.time()

    async def one(number: int) -> Sample:
        due_at = began_at + due_s[number]
        await asyncio.sleep(max(0.0, due_at - time.time()))
        return await ask(number, bodies[number], due_at)

    return await asyncio.gather(*map(one, range(len(due_s))))


# ---- over HTTP ----------------------------------------------------------------------------------


def over_http(client: httpx.AsyncClient, *, stream: bool) -> Ask:
    async def ask(index: int, body: Body, due_at: float) -> Sample:
        try:
            seen = await (_streamed if stream else _whole)(client, body)
        except Exception as error:  # any error is a request without an answer
            why = f"{type(error).__name__}: {error}"[:300]
            return Sample(index=index, due_at=due_at, ended_at=time.time(), error=why)
        return Sample(index=index, due_at=due_at, ended_at=time.time(), **seen)

    return ask


def _path(body: Body) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


async def _whole(client: httpx.AsyncClient, body: Body) -> dict[str, Any]:
    response = await client.post(_path(body), json=body)
    if not response.is_success:
        raise RuntimeError(f"{response.status_code} {response.text}")
    return seen_in(response.json())


def seen_in(document: Body) -> dict[str, Any]:
    """The fields of a `Sample` from a complete answer."""
    return {
        "tokens": document["usage"]["completion_tokens"],
        "revision": document["system_fingerprint"],
        "token_ids": tuple(i for each in document["choices"] for i in each.get("token_ids") or ()),
    }


async def _streamed(client: httpx.AsyncClient, body: Body) -> dict[str, Any]:
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    seen: dict[str, Any] = {"token_ids": ()}
    async with client.stream("POST", _path(body), json=asked) as response:
        if not response.is_success:
            raise RuntimeError(f"{response.status_code} {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            seen.setdefault("first_at", time.time())
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            seen["revision"] = chunk["system_fingerprint"]
            for choice in chunk["choices"]:
                seen["token_ids"] += tuple(choice.get("token_ids") or ())
            if chunk.get("usage"):
                seen["tokens"] = chunk["usage"]["completion_tokens"]
    if "tokens" not in seen:
        raise RuntimeError("the stream has no end")
    return seen


async def _run(job: Job, stop: threading.Event | None) -> list[Sample]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=job.url, timeout=TIMEOUT_S, limits=limits) as client:
        ask = over_http(client, stream=job.stream)
        # opens a connection, so that the first request is like the others
        await client.get("/health")
        if job.due_s is not None:
            return await open_loop(ask, job.bodies, job.due_s)
        return await closed_loop(ask, job.bodies, clients=job.clients, stop=stop)


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    stop = threading.Event() if job.endless else None
    if stop:
        threading.Thread(target=_set_at_end_of_input, args=[stop], daemon=True).start()
    for sample in asyncio.run(_run(job, stop)):
        print(json.dumps(asdict(sample)))


def _set_at_end_of_input(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main()
