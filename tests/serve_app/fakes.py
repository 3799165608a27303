"""Stand-ins for what a unit test does without: Ray's object store, and an engine that generates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

from hotswap_lib import AdapterImage, CompileGuard, Receipt, Slot, Staged
from serve_app.admission import Admission

NEVER_S = 10.0


class FakeRef:
    """What `ray.put` returns, as far as anyone here looks: await it and there is the image."""

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
    """A real slot and a real gate, and nothing that runs. `faults`: what the next swaps raise."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.admission = Admission()
        self.guard = CompileGuard()
        self.faults: list[Exception] = []
        self.drained = asyncio.Event()
        self.drained.set()
        self.swaps: list[str] = []

    async def swap(self, staged: Staged) -> tuple[Receipt, float, float]:
        async with self.admission.drained(timeout_s=NEVER_S):
            await self.drained.wait()
            if self.faults:
                raise self.faults.pop(0)
            receipt = self.slot.commit(staged)
            self.swaps.append(str(receipt.revision))
        return receipt, 0.5, 0.25


async def until(condition: Callable[[], bool], what: str = "it never happened") -> None:
    """Wait for a condition, and fail when it takes too long."""
    deadline = asyncio.get_running_loop().time() + NEVER_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.002)


async def settled() -> None:
    """Let every task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)
