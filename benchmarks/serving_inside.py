"""In one process, without Serve: the price of a slot, the work of lanes, the choice of compilation.

These rows have no bar; they explain the throughput of the other rows.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from benchmarks.load import prompts
from benchmarks.serving_bare import bare, manager_of, plain_peft, saturate
from benchmarks.serving_figures import Figure, paired, summary
from benchmarks.serving_throughput import CANARY, EVERY
from benchmarks.serving_world import PAGE_TOKENS, World, cores
from hotswap_lib import CompileGuard, Slot, pack
from serve_app.engine.attention import make_opaque
from serve_app.engine.causal import CausalEngine
from serve_app.engine.compile import compile_layers, compile_regions
from serve_app.engine.sampling_params import SamplingParams
from serve_app.replica.loading import load
from serve_app.settings import parse

BATCHES = (1, 8, 32)
STEPS = 8  # measured in a row, then another variant follows
_FIRST_STEPS = 2  # of a run: they process prompts
_STEP_PROMPT = 4  # tokens; the prompts of the largest batch fit in one step
_GREEDY = SamplingParams(temperature=0.0)


@contextmanager
def _own_compiler() -> Iterator[None]:
    """Raises dynamo's limit: all models are the same code to it, compiled once for each."""
    torch.set_num_threads(cores())
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()
    gc.collect()


# ---- the engine without Serve -------------------------------------------------------------------


class InHand:
    """A started engine of the application, and its loop."""

    def __init__(self, world: World) -> None:
        settings = parse({**world.settings, "torch_threads": cores()})
        loaded = load(settings)
        self.slot: Slot = loaded.slot
        self.slot.commit(self.slot.stage(pack(str(world.first), self.slot.layout)))
        self.engine = CausalEngine(self.slot, settings, eos_token_ids=loaded.eos_token_ids)
        self._runner = asyncio.Runner()
        self.engine.start()
        self._runner.run(self.engine.warm_up())
        self.engine.admission.open()

    def close(self) -> None:
        self.engine.stop()
        self._runner.close()

    def hold(self, world: World) -> str:
        """Loads the canary; returns its revision."""
        image = pack(str(world.adapters[1]), self.slot.layout)
        self._runner.run(self.engine.add(self.slot.stage(image)))
        return str(image.revision)

    def saturate(
        self,
        asked: Sequence[list[int]],
        *,
        clients: int,
        max_tokens: int,
        pins: Sequence[str | None] | None = None,
    ) -> dict[str, float]:
        named = pins or [None] * len(asked)
        left = list(zip(asked, named, strict=True))[::-1]

        async def client() -> int:
            tokens = 0
            while left:
                tokens += await self._answer(*left.pop(), max_tokens)
            return tokens

        async def all_clients() -> int:
            return sum(await asyncio.gather(*(client() for _ in range(clients))))

        began = time.perf_counter()
        tokens = self._runner.run(all_clients())
        return {"tokens": tokens, "seconds": time.perf_counter() - began}

    async def _answer(self, ids: list[int], pin: str | None, max_tokens: int) -> int:
        async with self.engine.admit(pin) as ticket:
            steps = ticket.generate(ids, max_tokens=max_tokens, sampling=_GREEDY, stream=False)
            return [len(step.token_ids) async for step in steps][-1]


@dataclass
class Counted:
    """The work of an engine's lanes: the requests and time of each step, the time of commits."""

    batches: list[list[int]]
    step_s: list[list[float]]  # with the wait for the weight lock
    commit_s: list[float] = field(default_factory=list)

    def document(self, seconds: float) -> dict[str, Any]:
        return {
            "commits": len(self.commit_s),
            "commit_ms": round(statistics.median(self.commit_s or [0]) * 1e3, 3),
            "commits_share": round(sum(self.commit_s) / seconds, 4),
            "lanes": [
                {
                    "steps_per_second": round(len(batches) / seconds, 2),
                    "mean_batch": round(statistics.mean(batches), 2),
                    "mean_step_ms": round(statistics.mean(steps) * 1e3, 2),
                }
                for batches, steps in zip(self.batches, self.step_s, strict=True)
                if batches
            ],
        }


@contextmanager
def counting(engine: CausalEngine) -> Iterator[Counted]:
    """Counts steps and commits. Patches private methods: nothing public runs at each step."""
    managers = engine.managers
    counted = Counted(batches=[[] for _ in managers], step_s=[[] for _ in managers])
    commit = Slot.commit

    def timed_commit(slot: Slot, *args: Any) -> Any:
        began = time.perf_counter()
        receipt = commit(slot, *args)
        counted.commit_s.append(time.perf_counter() - began)
        return receipt

    def watched(lane: int, manager: Any) -> Callable[[], None]:
        step = manager.run_step

        def run() -> None:
            batch = len(manager.last_batch())
            began = time.perf_counter()
            step()
            counted.step_s[lane].append(time.perf_counter() - began)
            counted.batches[lane].append(batch)

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Slot, "commit", timed_commit))
        for lane, manager in enumerate(managers):
            stack.enter_context(mock.patch.object(manager, "run_step", watched(lane, manager)))
        yield counted


def lanes(world: World) -> Iterator[Figure]:
    """The throughput of a 10 % canary, by lane."""
    effort = world.effort
    with _own_compiler():
        hand = InHand(world)
        try:
            revision = hand.hold(world)
            pins = [revision if i % EVERY == 0 else None for i in range(effort.requests)]
            speeds: dict[str, list[float]] = {"stable": [], CANARY: []}
            found: dict[str, dict[str, Any]] = {}
            for turn in range(-1, effort.rounds):  # the first one warms up
                asked = prompts(turn, effort.requests, vocabulary=world.vocabulary)
                tokens = effort.tokens if turn >= 0 else 4
                for way, named in (("stable", None), (CANARY, pins)):
                    with counting(hand.engine) as counted:
                        took = hand.saturate(
                            asked, clients=world.concurrency, max_tokens=tokens, pins=named
                        )
                    if turn < 0:
                        continue
                    speeds[way].append(took["tokens"] / took["seconds"])
                    found[way] = counted.document(took["seconds"])
        finally:
            hand.close()
    for way in speeds:
        parts = ", ".join(
            f"{lane['steps_per_second']:.1f} steps/s of {lane['mean_batch']:.1f}"
            for lane in found[way]["lanes"]
        )
        yield Figure(
            name=f"lanes, {way}",
            value=statistics.median(speeds[way]),
            unit="tokens/s",
            says=f"{parts}; {found[way]['commits']} commits of {found[way]['commit_ms']:.1f} ms = "
            f"{100 * found[way]['commits_share']:.1f} % of the time",
            detail=found[way] | summary(speeds[way]),
        )
    yield Figure(
        name="tokens/s, 10 % canary / stable alone, in process",
        value=paired(speeds[CANARY], speeds["stable"]),
        unit="x",
    )


# ---- the price of a slot ------------------------------------------------------------------------


def merged(world: World) -> Iterator[Figure]:
    """The engine against a bare manager over merged weights, compiled the same way."""
    effort, what = world.effort, bare(world, threads=cores())
    speeds: dict[str, list[float]] = {"engine": [], "merged": []}
    with _own_compiler():
        model = plain_peft(what).merge_and_unload()
        if world.compile:
            _compile_layers(model)
        manager = manager_of(model, what)
        manager.warmup()
        manager.start()
        _warm_up(manager)
        hand = InHand(world)
        ways = {"engine": hand.saturate, "merged": _of(manager)}
        try:
            guard = CompileGuard()
            for turn in range(-1, effort.rounds):
                if turn == 0:
                    guard.arm()
                asked = prompts(turn, effort.requests, vocabulary=world.vocabulary)
                for way in sorted(ways, reverse=turn % 2 == 1):
                    tokens = effort.tokens if turn >= 0 else 4
                    took = ways[way](asked, clients=world.concurrency, max_tokens=tokens)
                    if turn >= 0:
                        speeds[way].append(took["tokens"] / took["seconds"])
        finally:
            hand.close()
            manager.stop(block=True, timeout=10, hard_stop=True)
    yield Figure(
        name="tokens/s, engine / merged weights",
        value=paired(speeds["engine"], speeds["merged"]),
        unit="x",
        says="the price of a slot, in process; "
        + " / ".join(f"{statistics.median(values):.0f}" for values in speeds.values())
        + " tokens/s"
        + (f"; {guard.recompiles} compilations while measured" if guard.recompiles else ""),
        detail={way: summary(values) for way, values in speeds.items()},
    )


def _warm_up(manager: Any) -> None:
    """Runs every kind of step, like the engine: a batch of 1 has compiled code of its own."""
    short, long = [1, 2, 3, 4], list(range(5, 5 + 2 * PAGE_TOKENS))
    for asked in ([[1]], [short], [short, long], [long] * 3):
        saturate(manager, asked, clients=len(asked), max_tokens=4)


def _compile_layers(model: Any) -> None:
    """Compiles like the engine."""
    assert make_opaque(model)
    compile_layers(model)


def _of(manager: Any) -> Callable[..., dict[str, float]]:
    def run(asked: Sequence[list[int]], **how: Any) -> dict[str, float]:
        return saturate(manager, asked, **how)

    return run


# ---- what to compile ----------------------------------------------------------------------------


class _Timed(ContinuousBatchingManager):  # type: ignore[misc]
    """Records the requests and the seconds of each step."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.steps: list[tuple[int, float]] = []

    def _generation_step(self) -> None:
        batch = len(self.batch_processor.inputs_and_outputs.requests_in_batch)
        began = time.perf_counter()
        super()._generation_step()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps.append((batch, time.perf_counter() - began))

    def run(self, batch: int) -> list[float]:
        """Seconds of the steps in which `batch` requests generated one token each."""
        self.steps.clear()
        asked = [[100 + i] * _STEP_PROMPT for i in range(batch)]
        saturate(self, asked, clients=batch, max_tokens=STEPS + _FIRST_STEPS + 1)
        return [took_s for size, took_s in self.steps if size == batch][_FIRST_STEPS:]


def steps(world: World) -> Iterator[Figure]:
    """The time of a step without compilation, with compiled layers, with compiled regions."""
    what = bare(world, threads=cores())
    with _own_compiler():
        models = {
            "PEFT, not compiled": plain_peft(what),
            "compiled layers": _prepared(world, whole_layers=True),
            "compiled regions": _prepared(world, whole_layers=False),
        }
        managers = {name: manager_of(model, what, _Timed) for name, model in models.items()}
        for manager in managers.values():
            manager.start()
        try:
            times = {batch: _step_times(managers, batch, world) for batch in BATCHES}
        finally:
            for manager in managers.values():
                manager.stop(block=True, timeout=10, hard_stop=True)
    for batch, took in times.items():
        medians = {name: statistics.median(values) for name, values in took.items()}
        plain, whole, regions = medians.values()
        yield Figure(
            name=f"step of batch {batch}, compiled layers / PEFT",
            value=whole / plain,
            unit="x",
            says=f"{whole * 1e3:.1f} / {plain * 1e3:.1f} ms; "
            f"small regions {regions * 1e3:.1f} ms, {regions / plain:.2f} x",
            detail={name: summary([1e3 * v for v in values]) for name, values in took.items()},
        )


def _step_times(managers: dict[str, Any], batch: int, world: World) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in managers}
    turns, order = list(managers), random.Random(0)
    for turn in range(-2, world.effort.step_rounds):  # the first ones compile and warm up
        order.shuffle(turns)
        for name in turns:
            took = managers[name].run(batch)
            if turn >= 0:
                times[name] += took
    return times


def _prepared(world: World, *, whole_layers: bool) -> Any:
    settings = parse({**world.settings, "torch_threads": cores()})
    slot = load(settings).slot
    slot.commit(slot.stage(pack(str(world.first), slot.layout)))
    model: Any = slot.model.base_model.model
    if not world.compile:
        return slot.model
    if whole_layers:
        _compile_layers(model)
    else:
        compile_regions(model)
    return slot.model
