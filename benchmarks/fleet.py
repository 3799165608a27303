"""The cost of a rollout for the controller, up to 10,000 replicas; the speed of real ones.

``python -m benchmarks.fleet [--json [PATH]] [--quick]``

Simulated: the controller itself, with its journal and its store on this disk, and replicas that
only report: each does at once what a document asks for. Counted is the CPU time of this process,
that of the simulated replicas included. A canary of two steps on shared replicas, then the waves, a
quarter of the fleet each. Real: Ray actors with a tiny model each, with the application's control
loop; `converge` is from the accepted request to the last acknowledgement, all at once.

Exit code 1 when an adapter was read or packed more than once in a rollout.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import itertools
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.serving_figures import Figure
from benchmarks.serving_world import SHAPE_TINY, random_adapters, random_model
from hotswap_lib import Envelope, Layout, Revision, Slot, prepare
from serve_app.controller import images, rollout_requests
from serve_app.controller.deployment import Controller
from serve_app.controller.images import AdapterStore
from serve_app.controller.journal import Journal
from serve_app.controller.probing import RayProbes
from serve_app.engine.causal import CausalEngine
from serve_app.replica.control_loop import ControlLoop
from serve_app.rollout.plan import CanaryStep, Plan
from serve_app.rollout.state import Desired, ReplicaState
from serve_app.settings import Settings
from serve_app.wire.reports import Answer, Report

SIZES = (10, 100, 1_000, 3_000, 10_000)
QUICK_SIZES = (10, 100, 300)
REAL = (2, 4, 8, 16, 32)
QUICK_REAL = (2,)
ROLLOUTS = 5  # of the real fleet, at each size
COST_BAR_MS = 1.0
PACKAGES = ("ray", "torch", "transformers")
COLORS = {"held": "green", "missed": "yellow", "reported": "dim"}


class Shadow:
    """A replica that does at once what a document asks for."""

    def __init__(self, name: str, layout: Layout, stable: Revision) -> None:
        self._name, self._layout = name, layout
        self._stable = stable.key
        self._acting_on: Desired | None = None

    async def run(self, controller: Controller) -> None:
        while True:
            answer = await controller.report(self._report())
            if answer.introduce:
                await controller.join(self._name, self._layout)
            elif (want := answer.desired) is not None:
                self._acting_on = want

    def _report(self) -> Report:
        want = self._acting_on
        return Report(
            replica=self._name,
            layout=self._layout.fingerprint,
            acting_on=want,
            state=ReplicaState(
                holds=self._stable if want is None else want.hold,
                staged=None if want is None else want.stage,
                serving=want is not None,
                also_serves=() if want is None else want.also_serves,
                traffic=None if want is None else want.traffic,
            ),
            running=0,
            recompiles=0,
            limit_hits=0,
            last_swap=None,
            pid=0,
            node="",
        )


def simulated(
    sizes: Sequence[int], slot: Slot, adapters: Sequence[Path], console: Console
) -> Iterator[Figure]:
    costs: dict[int, float] = {}
    for size in sizes:
        gc.collect()
        with tempfile.TemporaryDirectory() as state:
            cost_s, wall_s, counted = asyncio.run(_rolled(size, slot, adapters, state))
        costs[size] = 1000 * cost_s / size
        console.print(f"{size:6d} simulated: {costs[size]:.3f} ms of CPU each", style="dim")
        yield Figure(
            name=f"CPU of a rollout over {size} simulated replicas, each",
            value=costs[size],
            unit=" ms",
            bar=f"≤ {COST_BAR_MS}" if size == 1_000 else None,
            says=f"{wall_s:.2f} s in all; the adapter was read {counted['reads']} x, "
            f"packed {counted['packs']} x, put {counted['puts']} x",
            detail={"cpu_s": cost_s, "wall_s": wall_s, **counted},
        )
        yield Figure(
            name=f"reads and packs of the adapter, {size} replicas",
            value=max(counted.values()),
            bar="≤ 1",
            fails=True,
        )
    large, larger = sizes[-2:]
    yield Figure(
        name=f"CPU for each of {larger} / each of {large}",
        value=costs[larger] / costs[large],
        unit="x",
        says="1 is linear growth",
    )


async def _rolled(
    size: int, slot: Slot, adapters: Sequence[Path], state: str
) -> tuple[float, float, dict[str, int]]:
    """CPU and wall seconds of the second rollout; the first one warms up."""
    counted = dict.fromkeys(("reads", "packs", "puts"), 0)

    def put(_: Any) -> Any:
        counted["puts"] += 1
        return object()

    controller = Controller(
        Settings(poll_s=60),
        journal=Journal(state),
        store=AdapterStore(state),
        put=put,
        probing=RayProbes("benchmark"),
    )
    await controller.start()
    shadows = [Shadow(f"r{i}", slot.layout, slot.revision) for i in range(size)]
    tasks = [asyncio.create_task(shadow.run(controller)) for shadow in shadows]
    while len((await controller.fleet()).replicas) < size:
        await asyncio.sleep(0.05)
    steps = (CanaryStep(weight=10), CanaryStep(weight=50))
    with (
        _counting(rollout_requests, "load_adapter", counted, "reads"),
        _counting(images, "pack", counted, "packs"),
    ):
        for adapter in adapters[:2]:
            counted.update(dict.fromkeys(counted, 0))
            plan = Plan(
                adapter=str(adapter),
                strategy="canary",
                steps=steps,
                max_unavailable=max(size // 4, 1),
            )
            cpu, wall = time.process_time(), time.monotonic()
            rollout = await controller.start_rollout(plan)
            while not (await controller.rollout(rollout.id)).ended:
                await asyncio.sleep(0.05)
            cpu, wall = time.process_time() - cpu, time.monotonic() - wall
            assert (await controller.rollout(rollout.id)).state == "succeeded"
    await controller.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return cpu, wall, counted


def _counting(module: Any, name: str, counted: dict[str, int], what: str) -> Any:
    real = getattr(module, name)

    def counts(*args: Any, **kwargs: Any) -> Any:
        counted[what] += 1
        return real(*args, **kwargs)

    return mock.patch.object(module, name, counts)


# ---- real actors ------------------------------------------------------------------------------


class Decides:
    """The controller in an actor."""

    async def __init__(self, state: str) -> None:  # type: ignore[misc]  # Ray awaits methods only
        self._controller = Controller(
            Settings(),
            journal=Journal(state),
            store=AdapterStore(state),
            probing=RayProbes("benchmark"),
        )

    async def start(self) -> None:
        await self._controller.start()

    async def join(self, replica: str, layout: Layout) -> None:
        await self._controller.join(replica, layout)

    async def report(self, report: Report) -> Answer:
        return await self._controller.report(report)

    async def leave(self, replica: str) -> None:
        await self._controller.leave(replica)

    async def serving(self) -> int:
        return sum(replica.serving for replica in (await self._controller.fleet()).replicas)

    async def roll(self, adapter: str) -> float:
        """Milliseconds from the accepted request to the last acknowledgement."""
        view = await self._controller.start_rollout(Plan(adapter=adapter, strategy="all_at_once"))
        while not view.ended:
            await asyncio.sleep(0.005)
            view = await self._controller.rollout(view.id)
        assert view.state == "succeeded", view
        assert view.converge_ms is not None
        return view.converge_ms


class Member:
    """A replica's engine and control loop, without requests."""

    async def start(self, name: str, model: str, controller: Any) -> None:
        torch.set_num_threads(1)
        settings = Settings(model=model, compile=False)
        slot = _slot(model)
        self._engine = CausalEngine(slot, settings, eos_token_ids=[])
        self._engine.start()
        self._lane = ControlLoop(self._engine, _Calls(controller), replica=name)
        await self._lane.ready


class _Calls:
    def __init__(self, controller: Any) -> None:
        self._controller = controller

    async def join(self, replica: str, layout: Layout) -> None:
        await self._controller.join.remote(replica, layout)

    async def report(self, report: Report) -> Answer:
        answer: Answer = await self._controller.report.remote(report)
        return answer

    async def leave(self, replica: str) -> None:
        await self._controller.leave.remote(replica)


def real(sizes: Sequence[int], model: str, adapters: Sequence[Path]) -> Iterator[Figure]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as state:
            controller: Any = ray.remote(num_cpus=0, max_concurrency=1000)(Decides).remote(state)
            ray.get(controller.start.remote())
            members: list[Any] = []
            turns = itertools.cycle(adapters)  # never the one that the fleet holds
            for size in sizes:
                while len(members) < size:
                    some = [
                        ray.remote(num_cpus=0)(Member).remote()
                        for _ in range(min(4, size - len(members)))
                    ]
                    begun = [
                        one.start.remote(f"r{len(members) + i}", model, controller)
                        for i, one in enumerate(some)
                    ]
                    ray.get(begun, timeout=300)
                    members += some
                took = [
                    ray.get(controller.roll.remote(str(next(turns))), timeout=120)
                    for _ in range(ROLLOUTS)
                ]
                yield Figure(
                    name=f"converge, {size} actors",
                    value=statistics.median(took),
                    unit=" ms",
                    says=f"{min(took):.0f} to {max(took):.0f} ms in {len(took)} rollouts",
                    detail={"converge_ms": took},
                )
    finally:
        ray.shutdown()


def _slot(model: str) -> Slot:
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    return prepare(base, envelope=Envelope(max_rank=16))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", nargs="?", const="-", help="a file; without one, stdout")
    parser.add_argument("--quick", action="store_true", help="small fleets")
    asked = parser.parse_args()
    console = Console(stderr=asked.json == "-")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        model = str(random_model(Path(folder) / "tiny", SHAPE_TINY, dtype=torch.float32))
        adapters = random_adapters(model, Path(folder) / "adapters")
        slot = _slot(model)
        figures += simulated(QUICK_SIZES if asked.quick else SIZES, slot, adapters, console)
        figures += real(QUICK_REAL if asked.quick else REAL, model, adapters)
    _show(figures, console)
    if asked.json:
        _write(figures, asked.json)
    return int(any(figure.fails and figure.verdict == "missed" for figure in figures))


def _show(figures: Sequence[Figure], console: Console) -> None:
    table = Table("figure", "value", "bar", "", title="a rollout over a fleet")
    for figure in figures:
        color = COLORS[figure.verdict]
        table.add_row(
            figure.name,
            f"{figure.value:.3g}{figure.unit}",
            figure.bar or "",
            figure.says,
            style=color,
        )
    console.print(table)


def _write(figures: Sequence[Figure], where: str) -> None:
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "figures": [
            {
                "name": figure.name,
                "value": figure.value,
                "unit": figure.unit.strip(),
                "bar": figure.bar,
                "verdict": figure.verdict,
                "says": figure.says,
                "detail": figure.detail,
            }
            for figure in figures
        ],
    }
    text = json.dumps(document, indent=1)
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
