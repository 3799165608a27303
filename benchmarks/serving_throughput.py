"""Throughput of one replica: through a handle, over HTTP, with a canary, and of its peer.

Each round measures every way once, one after the other, with prompts of the same lengths; a ratio
is the median over the rounds. While one runs, the others sleep.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load import Body, Job, Sample, completions, prompts
from benchmarks.serving_bare import BareProcess, bare
from benchmarks.serving_figures import Figure, paired, summary
from benchmarks.serving_fleet import Fleet, fleet, over_http
from benchmarks.serving_world import World, model_cores

CANARY = "canary"
EVERY = 10  # every tenth request names the canary

Prompts = list[list[int]]
Way = Callable[[Prompts, int], tuple[float, float]]
"""(prompts, max_tokens) → (tokens, seconds)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One row: tokens/s of one way / tokens/s of another, in the same rounds."""

    name: str
    one: str
    other: str
    bar: str | None


RATIOS = {
    "handle": Ratio(name="handle / bare PEFT", one="handle", other="bare", bar="≥ 0.9"),
    "http": Ratio(name="HTTP / handle", one="http", other="handle", bar="≥ 0.85"),
    "http-stream": Ratio(name="HTTP streams / handle", one="http stream", other="handle", bar=None),
    "canary": Ratio(name="10 % canary / stable alone", one="canary", other="handle", bar=None),
}


@dataclass
class Speeds:
    """Way → tokens per second in each round; and the errors of failed requests."""

    per_second: dict[str, list[float]]
    tokens: dict[str, list[float]]
    failures: list[str] = field(default_factory=list)


def throughput(world: World, rows: Sequence[str]) -> Iterator[Figure]:
    """The figures of these rows of `RATIOS`."""
    ratios = [RATIOS[row] for row in rows]
    wanted = {way for ratio in ratios for way in (ratio.one, ratio.other)}
    with _ways(world, wanted) as (ways, failures):
        speeds = measure(world, ways)
    for ratio in ratios:
        one, other = speeds.per_second[ratio.one], speeds.per_second[ratio.other]
        yield Figure(
            name=f"tokens/s, {ratio.name}",
            value=paired(one, other),
            unit="x",
            bar=ratio.bar,
            says=f"{statistics.median(one):.0f} / {statistics.median(other):.0f} tokens/s, "
            f"{world.concurrency} clients",
            detail={
                ratio.one: summary(one) | {"tokens": speeds.tokens[ratio.one]},
                ratio.other: summary(other) | {"tokens": speeds.tokens[ratio.other]},
            },
        )
    yield Figure(
        name="failed requests, throughput",
        value=len(failures),
        bar="≤ 0",
        fails=True,
        says=failures[0] if failures else "",
    )


def measure(world: World, ways: dict[str, Way]) -> Speeds:
    effort = world.effort
    speeds = Speeds(per_second={way: [] for way in ways}, tokens={way: [] for way in ways})
    turns, order = list(ways), random.Random(0)
    for turn in range(-1, effort.rounds):  # the first one warms up, with fewer tokens
        order.shuffle(turns)
        for way in turns:
            # the same lengths, and no prompt that is in the engine's cache
            asked = prompts(turn, effort.requests, vocabulary=world.vocabulary, salt=way)
            tokens, seconds = ways[way](asked, effort.tokens if turn >= 0 else 4)
            if turn >= 0:
                speeds.per_second[way].append(tokens / seconds)
                speeds.tokens[way].append(tokens)
    return speeds


@contextmanager
def _ways(world: World, wanted: set[str]) -> Iterator[tuple[dict[str, Way], list[str]]]:
    failures: list[str] = []
    with ExitStack() as stack:
        running = stack.enter_context(fleet(world, replicas=1, torch_threads=model_cores()))
        ways = _served(world, running, failures)
        if "canary" in wanted:
            running.controller.load_adapter.remote(CANARY, str(world.adapters[1])).result()
        if "bare" in wanted:
            peer = stack.enter_context(BareProcess(bare(world, threads=model_cores())))
            ways["bare"] = _bare(world, peer)
        yield {name: way for name, way in ways.items() if name in wanted}, failures


def _served(world: World, running: Fleet, failures: list[str]) -> dict[str, Way]:
    clients = world.concurrency

    def counted(samples: Sequence[Sample]) -> tuple[float, float]:
        failures.extend(s.error for s in samples if s.error is not None)
        began = min(s.due_at for s in samples)
        return sum(s.tokens for s in samples), max(s.ended_at for s in samples) - began

    def handle(asked: Prompts, max_tokens: int) -> tuple[float, float]:
        return counted(running.ask_all(completions(asked, max_tokens=max_tokens), clients=clients))

    def http(stream: bool) -> Way:
        def ask(asked: Prompts, max_tokens: int) -> tuple[float, float]:
            bodies = completions(asked, max_tokens=max_tokens)
            return counted(
                over_http(Job(url=running.url, bodies=bodies, stream=stream, clients=clients))
            )

        return ask

    def canary(asked: Prompts, max_tokens: int) -> tuple[float, float]:
        bodies = with_canary(completions(asked, max_tokens=max_tokens), f"{running.name}:{CANARY}")
        return counted(running.ask_all(bodies, clients=clients))

    return {"handle": handle, "http": http(False), "http stream": http(True), "canary": canary}


def with_canary(bodies: Sequence[Body], model: str) -> list[Body]:
    return [b | ({"model": model} if i % EVERY == 0 else {}) for i, b in enumerate(bodies)]


def _bare(world: World, peer: BareProcess) -> Way:
    def ask(asked: Prompts, max_tokens: int) -> tuple[float, float]:
        result: dict[str, Any] = peer.saturate(
            asked, clients=world.concurrency, max_tokens=max_tokens
        )
        return result["tokens"], result["seconds"]

    return ask
