"""Revisions: the revisions that an engine serves, and the images that it keeps for them.

A request names a revision or gets the default one. A staged image stays in memory while its
revision is served, has running requests, or is being verified.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

from hotswap_lib import Receipt, Revision, Staged
from serve_app.engine.weight_lock import WeightLock
from serve_app.rollout.state import Traffic
from serve_app.rollout.traffic_split import TrafficSplit
from serve_app.wire.errors import RevisionNotServed

T = TypeVar("T")


class Revisions:
    """The default revision and the loaded adapters of one engine. For one event loop.

    Attributes:
        default: the revision of requests that name none.
    """

    def __init__(self, weight_lock: WeightLock, on_removed: Callable[[Revision], None]) -> None:
        """`on_removed` is called after the image of a revision was removed."""
        self.default = weight_lock.slot.revision
        self._weight_lock = weight_lock
        self._on_removed = on_removed
        self._split = TrafficSplit(start=random.random())
        self._loaded: set[Revision] = set()
        self._running: Counter[Revision] = Counter()
        self._verifying: Counter[Revision] = Counter()

    @property
    def served(self) -> tuple[Revision, ...]:
        """The default revision, then the loaded adapters."""
        return self.default, *sorted(self._loaded - {self.default}, key=str)

    @property
    def running(self) -> Mapping[Revision, int]:
        """The number of running requests of each revision that has any."""
        return +self._running

    def named(self, pin: str) -> Revision:
        """The served revision that `pin` names: `name`, `name@digest8` or in full.

        Raises:
            RevisionNotServed: none of them matches.
        """
        # loaded adapters first: a bare name means the adapter that was loaded under it, even if
        # the default revision has the same name
        for revision in (*sorted(self._loaded, key=str), self.default):
            if revision.matches(pin):
                return revision
        raise RevisionNotServed(pin, tuple(map(str, self.served)))

    def choose(self, traffic: Traffic | None, session: str | None) -> Revision:
        """The revision of a request that names none: the default, or the canary by its weight."""
        if traffic is None or traffic.placement == "dedicated":
            return self.default
        for revision in self._loaded:
            if revision.key == traffic.canary:
                return revision if self._split.to_canary(traffic, session) else self.default
        return self.default

    # ---- changes ------------------------------------------------------------------------------

    async def make_default(self, staged: Staged) -> tuple[Receipt, float]:
        """Commits and verifies, then makes it the default. Returns seconds of verifying as well.

        Raises:
            VerifyFailed: the weights did not take the image; nothing has changed.
        """
        with self.verifying(staged):
            result = await self._commit(staged.revision)
            before, self.default = self.default, staged.revision
            self._remove_unused(before)
            return result

    async def add(self, staged: Staged) -> None:
        """Commits and verifies, then serves it to requests that name it. Raises `VerifyFailed`."""
        with self.verifying(staged):
            await self._commit(staged.revision)
            self._loaded.add(staged.revision)

    def remove(self, revision: Revision) -> None:
        """Stops serving it to requests that name it."""
        self._loaded.discard(revision)
        self._remove_unused(revision)

    def request_started(self, revision: Revision) -> None:
        self._running[revision] += 1

    def request_ended(self, revision: Revision) -> None:
        self._running[revision] -= 1
        self._remove_unused(revision)

    @contextmanager
    def verifying(self, staged: Staged) -> Iterator[None]:
        """Keeps the staged image alive until it is verified.

        Otherwise it would be removed if the last request on that revision ended meanwhile.
        """
        self._verifying[staged.revision] += 1
        self._weight_lock.add(staged)
        try:
            yield
        finally:
            self._verifying -= Counter([staged.revision])
            self._remove_unused(staged.revision)

    async def _commit(self, revision: Revision) -> tuple[Receipt, float]:
        return await _finished(asyncio.to_thread(self._weight_lock.commit_and_verify, revision))

    def _remove_unused(self, revision: Revision) -> None:
        needed = revision == self.default or revision in self._loaded or revision in self._verifying
        if not needed and self._running[revision] <= 0:
            del self._running[revision]
            self._weight_lock.drop(revision)
            self._on_removed(revision)


async def _finished(work: Awaitable[T]) -> T:
    """The result of `work`. A cancelled caller waits for its end too: a thread writes weights."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # however often it is cancelled
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise
