"""The effect of swaps on clients: latency while the fleet swaps, and the correctness of answers.

Two replicas of one thread each. Latency is measured in an open loop, with Poisson arrivals at 40 %
of the fleet's capacity, so that a slow moment is not hidden by clients that wait for it. Swaps are
so far apart that most requests meet none; requests that meet one are compared with those. Answers
are compared with plain PEFT, for questions with a clear best token at every step.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import Body, Job, Sample, arrivals, completions, prompts
from benchmarks.serving_figures import (
    Figure,
    Windows,
    latencies,
    percentile,
    split,
    split_by_arrival,
    summary,
)
from benchmarks.serving_fleet import Fleet, HttpLoad, fleet, over_http
from benchmarks.serving_world import World
from examples.demo_load import MAX_TOKENS, QUESTIONS
from examples.demo_reference import references

LOAD = 0.4  # share of the measured capacity, that of large batches
REPLICAS = 2
BETWEEN_S = 1.0  # swaps while answers are compared: some requests meet no swap
CLIENTS = 8  # while answers are compared
BARS = {"overlap": "≤ 1.2", "drain": "≤ 2.0"}
MEASURES = {"latency": "latency_{}_s", "time to first token": "first_token_{}_s"}


def swaps(world: World, rows: Sequence[str]) -> Iterator[Figure]:
    """`overlap` and `drain`: latency under each. `exact`: failed or mismatched answers."""
    sent: list[Sample] = []
    turns = itertools.cycle([*world.adapters[1:], world.first])  # never the current one
    with _two_replicas(world) as running:
        if per_second := _rate(world, running) if {"overlap", "drain"} & set(rows) else 0.0:
            for policy in ("overlap", "drain"):
                if policy in rows:
                    samples, windows = _open_loop(world, running, policy, per_second, turns)
                    sent += samples
                    yield from _latency_figures(policy, samples, windows, per_second)
            errors = [s.error for s in sent if s.error is not None]
            yield _failures("failed requests, open loop", len(sent), errors)
        policies = ("overlap", "drain") if "exact" in rows else ()
        answers = {policy: _steady(world, running, policy, turns) for policy in policies}
    # the references only now: the fleet has freed its cores and memory
    yield from _exact_figures(world, answers)


@contextmanager
def _two_replicas(world: World) -> Iterator[Fleet]:
    import torch

    share = 1 / REPLICAS if torch.cuda.is_available() else 0
    with fleet(world, replicas=REPLICAS, torch_threads=1, num_gpus=share) as running:
        yield running


# ---- latency ------------------------------------------------------------------------------------


def _rate(world: World, running: Fleet) -> float:
    """Requests per second at `LOAD` of the capacity, which is measured in a closed loop."""
    effort, clients = world.effort, world.concurrency
    samples: list[Sample] = []
    for seed, number in ((-1, clients), (-2, 2 * clients)):  # the first one warms up
        asked = prompts(seed, number, vocabulary=world.vocabulary)
        bodies = completions(asked, max_tokens=effort.load_tokens)
        samples = over_http(Job(url=running.url, bodies=bodies, stream=True, clients=clients))
    took_s = max(s.ended_at for s in samples) - min(s.due_at for s in samples)
    return LOAD * len(samples) / took_s


def _open_loop(
    world: World, running: Fleet, policy: str, per_second: float, turns: Iterator[Path]
) -> tuple[list[Sample], Windows]:
    effort = world.effort
    due_s = arrivals(1, per_second=per_second, seconds=effort.load_s)
    asked = prompts(1, len(due_s), vocabulary=world.vocabulary)
    bodies = completions(asked, max_tokens=effort.load_tokens)
    windows = []
    with HttpLoad(Job(url=running.url, bodies=bodies, stream=True, due_s=due_s)) as load:
        ends = time.monotonic() + effort.load_s
        while time.monotonic() + effort.swap_every_s < ends:
            time.sleep(effort.swap_every_s)
            windows.append(running.swap(next(turns), in_flight=policy))
        return load.samples(), windows


def _latency_figures(
    policy: str, samples: Sequence[Sample], windows: Windows, per_second: float
) -> Iterator[Figure]:
    answered = [s for s in samples if s.error is None]
    met, steady = split(answered, windows)
    during, calm = latencies(met), latencies(steady)
    arrived = [latencies(part) for part in split_by_arrival(answered, windows)]
    swap_s = [end - begin for begin, end in windows]
    detail: dict[str, Any] = {
        "requests_per_second": round(per_second, 2),
        "swaps": len(windows),
        "swap_s": summary(swap_s) if swap_s else {},
        "during": during,
        "steady": calm,
        "by arrival": {"during": arrived[0], "steady": arrived[1]},
    }
    for what, key in MEASURES.items():
        for at in ("p99", "p50"):
            name = key.format(at)
            unbiased = _over(arrived[0][name], arrived[1][name])
            yield Figure(
                name=f"{at} {what}, {policy}: in swaps / steady",
                value=_over(during[name], calm[name]),
                unit="x",
                bar=BARS[policy] if at == "p99" else None,
                says=f"{during[name]:.2f} / {calm[name]:.2f} s, {len(met)} / {len(steady)} "
                f"requests at {per_second:.1f}/s, {len(windows)} swaps of "
                f"{percentile(swap_s, 50):.1f} s; by arrival {unbiased:.2f} x",
                detail=detail if name == "latency_p99_s" else {},
            )


def _over(one: float, other: float) -> float:
    return one / other if other else float("nan")


# ---- answers ------------------------------------------------------------------------------------


def _steady(world: World, running: Fleet, policy: str, turns: Iterator[Path]) -> list[Sample]:
    """The answers while the fleet swapped `swaps` times, half of them as streams."""
    bodies: list[Body] = [
        {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "return_token_ids": True,
        }
        for question in QUESTIONS
    ]
    jobs = [
        Job(url=running.url, bodies=bodies, stream=stream, clients=CLIENTS // 2, endless=True)
        for stream in (False, True)
    ]
    rollouts = world.effort.swaps // REPLICAS
    with HttpLoad(jobs[0]) as one, HttpLoad(jobs[1]) as other:
        for adapter in itertools.islice(turns, rollouts):
            time.sleep(BETWEEN_S)
            running.swap(adapter, in_flight=policy)
        return one.samples() + other.samples()


def _exact_figures(world: World, answers: dict[str, list[Sample]]) -> Iterator[Figure]:
    expected = _expected(world) if answers and world.exact else {}
    for policy, samples in answers.items():
        wrong = [why for s in samples if (why := _wrong(s, expected)) is not None]
        number = world.effort.swaps // REPLICAS * REPLICAS
        name = f"failed or mismatched answers over {number} swaps, {policy}"
        compared = "" if expected else ", not compared: no reference for this model"
        yield _failures(name, len(samples), wrong, more=compared)


def _expected(world: World) -> dict[tuple[str, str], tuple[int, ...]]:
    found = references(Path(world.base), world.adapters)
    return {key: answer.token_ids for key, answer in found}


def _wrong(sample: Sample, expected: dict[tuple[str, str], tuple[int, ...]]) -> str | None:
    if sample.error is not None:
        return sample.error
    question = QUESTIONS[sample.index % len(QUESTIONS)]
    right = expected.get((sample.revision, question))
    if expected and sample.token_ids != right:
        return f"{question!r} on {sample.revision}: {sample.token_ids}, expected {right}"
    return None


def _failures(name: str, number: int, wrong: Sequence[str], more: str = "") -> Figure:
    return Figure(
        name=name,
        value=len(wrong),
        bar="≤ 0",
        says=f"of {number}{more}" + (f"; {wrong[0]}" if wrong else ""),
        detail={"answers": number, "examples": list(dict.fromkeys(wrong))[:5]},
        fails=True,
    )
