"""Stand-ins for what a unit test does without: Ray's object store, and an engine that generates."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from hotswap_lib import AdapterImage, CompileGuard, Revision, Slot, Staged
from serve_app.engine.admission import Admission
from serve_app.engine.request_recorder import RequestRecorder
from serve_app.engine.steps import Cutover
from serve_app.rollout.state import Traffic
from serve_app.wire.admin import LaneView

NEVER_S = 30.0


class FakeRef:
    """What `ray.put` returns, as far as these tests need it: await it and there is the image."""

    def __init__(self, image: AdapterImage) -> None:
        self.image = image

    def __await__(self) -> Generator[Any, None, AdapterImage]:
        yield from asyncio.sleep(0).__await__()
        return self.image


class CountingPut:
    """Remembers what was put; `ray.put` for a test."""

    def __init__(self) -> None:
        self.images: list[AdapterImage] = []

    def __call__(self, image: AdapterImage) -> Any:
        self.images.append(image)
        return FakeRef(image)


class FakeEngine:
    """A real slot and a real gate, and nothing that runs.

    `faults`: what the next cutovers raise. `holding_fails`: name → what serving it raises.
    `traffic` and `ledger`: as in the real one; a test writes the requests into the recorder itself.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.admission = Admission()
        self.guard = CompileGuard()
        self.default = slot.revision
        self.also_serves: set[Revision] = set()
        self.traffic: Traffic | None = None
        self.recorder = RequestRecorder()
        self.faults: list[Exception] = []
        self.holding_fails: dict[str, Exception] = {}
        self.drained = asyncio.Event()
        self.drained.set()
        self.swaps: list[str] = []
        self.policies: list[str] = []
        self.served: list[set[str]] = []  # after each change, by name

    @property
    def serves(self) -> tuple[Revision, ...]:
        return self.default, *sorted(self.also_serves - {self.default}, key=str)

    def lanes(self) -> tuple[LaneView, ...]:
        return tuple(LaneView(revision=str(revision)) for revision in self.serves)

    def apply_traffic(self, traffic: Traffic | None) -> None:
        self.traffic = traffic
        self.recorder.start_step(None if traffic is None else traffic.step_id)

    async def cut_over(self, staged: Staged, *, in_flight: str) -> Cutover:
        self.policies.append(in_flight)
        if in_flight == "overlap":
            return self._switch(staged)
        async with self.admission.drained(timeout_s=NEVER_S):
            await self.drained.wait()
            return self._switch(staged)

    def _switch(self, staged: Staged) -> Cutover:
        if self.faults:
            raise self.faults.pop(0)
        receipt = self.slot.commit(staged)
        self.default = receipt.revision
        self.swaps.append(str(receipt.revision))
        self._changed()
        return Cutover(receipt=receipt, drain_ms=0.5, verify_ms=0.25)

    async def add(self, staged: Staged) -> None:
        if (error := self.holding_fails.get(staged.revision.name)) is not None:
            raise error
        self.slot.commit(staged)  # as lanes do: what is in the weights is not what is the default
        self.also_serves.add(staged.revision)
        self._changed()

    def remove(self, revision: Revision) -> None:
        self.also_serves.discard(revision)
        self._changed()

    def _changed(self) -> None:
        self.served.append({revision.name for revision in self.serves})


@contextmanager
def bucket(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on loopback with one empty bucket; yields a URI of a folder in it."""
    from moto.moto_server.werkzeug_app import (  # seconds to import, and few tests need it
        DomainDispatcherApplication,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        patch.setenv(f"AWS_{name}", "dummy")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # one request at a time: moto looks and then writes, where S3 creates an object exclusively
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=False)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
        name = f"bucket-{uuid4().hex}"
        fsspec.filesystem("s3").mkdir(name)
        yield f"s3://{name}/hotswap/state"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


async def until(condition: Callable[[], bool], what: str | None = None) -> None:
    """Wait for a condition; after `NEVER_S`, fail with `what` or the condition's source text."""
    deadline = asyncio.get_running_loop().time() + NEVER_S
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(what or f"waited for {inspect.getsource(condition).strip()}")
        await asyncio.sleep(0.002)


async def settled() -> None:
    """Let every task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)
