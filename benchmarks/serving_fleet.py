"""A fleet for the time of a benchmark: Ray, Serve and the application, started and stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.load import Body, Job, Sample, closed_loop, seen_in
from benchmarks.serving_world import World
from serve_app.app import build
from serve_app.settings import parse
from serve_app.wire.admin import FleetView, RolloutView, StartView

ROOT = Path(__file__).resolve().parent.parent
APP = "bench"
MODEL, CONTROLLER = "Model", "RolloutController"
_RAY_CPUS = 16  # reserved, not used; torch_threads sets the use


class NotSwapped(Exception):
    """A rollout did not succeed."""


@dataclass(frozen=True)
class Fleet:
    """A running application, used through its handles or over HTTP."""

    url: str
    name: str  # of the model, in requests
    model: Any
    controller: Any

    def view(self) -> FleetView:
        fleet: FleetView = self.controller.fleet.remote().result()
        return fleet

    def starts(self) -> list[StartView]:
        return [replica.start for replica in self.view().replicas if replica.start is not None]

    def ask_all(self, bodies: Sequence[Body], *, clients: int) -> list[Sample]:
        """Closed loop through the handle, from this process."""
        return asyncio.run(closed_loop(self._through_handle, bodies, clients=clients))

    def swap(self, adapter: Path, *, in_flight: str) -> tuple[float, float]:
        """Swap the whole fleet. Returns the times of its start and end. Raises `NotSwapped`."""
        plan = {"adapter": str(adapter), "strategy": "rolling", "in_flight": in_flight}
        rollout: RolloutView = self.controller.start_rollout.remote(plan).result()
        while not rollout.ended:
            time.sleep(0.05)
            rollout = self.controller.rollout.remote(rollout.id).result()
        if rollout.state != "succeeded":
            raise NotSwapped(f"{rollout.target}: {rollout.state}, {rollout.reason}")
        assert rollout.ended_at is not None
        return rollout.created_at, rollout.ended_at

    async def _through_handle(self, index: int, body: Body, due_at: float) -> Sample:
        try:
            seen = seen_in(await self.model.complete.remote(body))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:300]
            return Sample(index=index, due_at=due_at, ended_at=time.time(), error=why)
        return Sample(index=index, due_at=due_at, ended_at=time.time(), **seen)


@contextmanager
def fleet(world: World, *, cache: Path | None = None, **settings: Any) -> Iterator[Fleet]:
    """The application on its own Ray cluster. `cache`: its `$HOTSWAP_CACHE`."""
    chosen = {"num_cpus": 0.1, "state_uri": str(_new_folder(world)), **world.settings, **settings}
    with _environment({"HOTSWAP_CACHE": None if cache is None else str(cache)}), _port() as port:
        try:
            serve.run(build(chosen), name=APP, route_prefix="/")
            yield Fleet(
                url=f"http://127.0.0.1:{port}",
                name=parse(chosen).model_name,
                model=serve.get_deployment_handle(MODEL, APP),
                controller=serve.get_deployment_handle(CONTROLLER, APP),
            )
        finally:
            serve.shutdown()


@contextmanager
def _port() -> Iterator[int]:
    """A Ray cluster with Serve; yields its port."""
    ray.init(
        address="local",  # never a cluster that runs already
        num_cpus=_RAY_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    leave_in_order()  # again: Ray's own handler would leave the cluster behind
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        ray.shutdown()


def leave_in_order() -> None:
    """Makes SIGTERM end this process like Ctrl-C, with everything that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None] | dict[str, str]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _new_folder(world: World) -> Path:
    return (
        world.folder / f"state-{time.time_ns()}"
    )  # so that the journal of an earlier fleet is not resumed


class HttpLoad:
    """`benchmarks.load` in its own process, which has ended after `samples` or `__exit__`."""

    def __init__(self, job: Job) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> HttpLoad:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def samples(self) -> list[Sample]:
        """All samples, after the load has ended; an endless job ends now."""
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the load ended with {self._process.returncode}")
        return [Sample(**_read(line)) for line in output.splitlines()]


def _read(line: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(line)
    return values | {"token_ids": tuple(values["token_ids"])}


def over_http(job: Job) -> list[Sample]:
    with HttpLoad(job) as load:
        return load.samples()
