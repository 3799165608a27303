"""Fetches and stages each image once, and keeps it as long as the desired state refers to it.

The reconciler asks for images by revision; the slot stages them. A new desired state does not
restart a fetch that is in progress.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import ray

from hotswap_lib import AdapterImage, Revision, Slot, Staged
from serve_app.async_tasks import retrieve_exception
from serve_app.wire.reports import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedImage:
    """A staged image, and the times that fetching and staging took."""

    staged: Staged
    fetch_ms: float
    stage_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    ref: ray.ObjectRef
    task: asyncio.Task[StagedImage]


class Staging:
    """Staged images by revision (`name@<64 hex>`). For one event loop."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._transfers: dict[str, _Transfer] = {}

    async def get(self, name: str, answer: Answer) -> StagedImage:
        """Returns the staged image of `name`. Fetches it from `answer` unless that is under way.

        Raises the controller's reason for having no image of it, and the errors of fetching and
        staging.
        """
        transfer = self._transfers.get(name)
        if transfer is None or not _succeeded(transfer.task):
            if name in answer.refused:
                raise answer.refused[name]
            transfer = self._fetch(name, answer.images[name])
        return await asyncio.shield(transfer.task)

    def revision(self, name: str) -> Revision | None:
        """Returns the revision `name` if its image is staged."""
        transfer = self._transfers.get(name)
        if transfer is None or not _succeeded(transfer.task):
            return None
        return transfer.task.result().staged.revision

    def keep_only(self, names: AbstractSet[str]) -> None:
        """Forgets all other images. The engine keeps those that it runs on."""
        for name in self._transfers.keys() - names:
            self.forget(name)

    def forget(self, name: str) -> None:
        if (transfer := self._transfers.pop(name, None)) is not None:
            transfer.task.cancel()

    async def close(self) -> None:
        tasks = [transfer.task for transfer in self._transfers.values()]
        self.keep_only(set())
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fetch(self, name: str, ref: ray.ObjectRef) -> _Transfer:
        transfer = self._transfers.get(name)
        if transfer is not None and transfer.ref == ref and not transfer.task.done():
            return transfer
        self.forget(name)
        task = asyncio.create_task(self._fetch_and_stage(ref))
        # the reconcile task that waits for it may be cancelled before it fails
        task.add_done_callback(retrieve_exception)
        self._transfers[name] = transfer = _Transfer(ref=ref, task=task)
        return transfer

    async def _fetch_and_stage(self, ref: ray.ObjectRef) -> StagedImage:
        began = time.monotonic()
        image: AdapterImage = await ref
        fetched = time.monotonic()
        staged = await asyncio.to_thread(self._slot.stage, image)
        return StagedImage(
            staged=staged,
            fetch_ms=(fetched - began) * 1e3,
            stage_ms=(time.monotonic() - fetched) * 1e3,
        )


def _succeeded(task: asyncio.Task[StagedImage]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
