"""What a replica brings next to its slot: each image fetched and staged once, while it is named.

Between the control lane, which knows what shall be there, and the slot. A document that comes while
an image is on its way does not send for it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import ray

from hotswap_lib import AdapterImage, Revision, Slot, Staged
from serve_app.wire.reports import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """A staged image, and how long it took to fetch and to stage it."""

    staged: Staged
    fetch_ms: float
    stage_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnItsWay:
    ref: ray.ObjectRef
    task: asyncio.Task[Brought]


class Staging:
    """Staged images by revision (`name@<64 hex>`). For one event loop."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._here: dict[str, _OnItsWay] = {}

    async def bring(self, name: str, answer: Answer) -> Brought:
        """The staged image of `name`, fetched from `answer` unless it is here or on its way.

        Raises why the controller has no image of it, or whatever fetching and staging it raise.
        """
        one = self._here.get(name)
        if one is None or not _is_here(one.task):
            if name in answer.refused:
                raise answer.refused[name]
            one = self._send_for(name, answer.images[name])
        return await asyncio.shield(one.task)

    def revision(self, name: str) -> Revision | None:
        """`name`, if its image is staged."""
        one = self._here.get(name)
        return one.task.result().staged.revision if one and _is_here(one.task) else None

    def keep_only(self, names: AbstractSet[str]) -> None:
        """Stop and free the rest; what the engine runs on, it keeps itself."""
        for name in self._here.keys() - names:
            self.forget(name)

    def forget(self, name: str) -> None:
        if (one := self._here.pop(name, None)) is not None:
            one.task.cancel()

    async def close(self) -> None:
        tasks = [one.task for one in self._here.values()]
        self.keep_only(set())
        await asyncio.gather(*tasks, return_exceptions=True)

    def _send_for(self, name: str, ref: ray.ObjectRef) -> _OnItsWay:
        one = self._here.get(name)
        if one is not None and one.ref == ref and not one.task.done():
            return one
        self.forget(name)
        task = asyncio.create_task(self._bring(ref))
        # whoever asked for it may have been stopped meanwhile, and nobody else looks at why
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._here[name] = one = _OnItsWay(ref=ref, task=task)
        return one

    async def _bring(self, ref: ray.ObjectRef) -> Brought:
        began = time.monotonic()
        image: AdapterImage = await ref
        fetched = time.monotonic()
        staged = await asyncio.to_thread(self._slot.stage, image)
        return Brought(
            staged=staged,
            fetch_ms=(fetched - began) * 1e3,
            stage_ms=(time.monotonic() - fetched) * 1e3,
        )


def _is_here(task: asyncio.Task[Brought]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
