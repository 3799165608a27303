"""WeightLock: several revisions share one set of weights, one step at a time.

A forward pass takes the lock and names a revision. If that revision is not in the weights, its
staged image is committed first, which is one copy. So every step runs on its own revision. The lock
is first come, first served: a busy lane cannot starve another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from hotswap_lib import Receipt, Revision, Slot, Staged


class WeightLock:
    """The staged images of a replica's revisions, and the lock on its weights.

    Attributes:
        commits: how often `on` had to change the weights.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.commits = 0
        self._staged = {slot.revision: slot.stage(slot.live)}
        self._lock = FairLock()

    @property
    def revisions(self) -> frozenset[Revision]:
        """The revisions whose staged images are in memory."""
        return frozenset(self._staged)

    @property
    def waiting(self) -> int:
        """Threads that wait for the lock."""
        return self._lock.waiting

    def add(self, staged: Staged) -> None:
        self._staged[staged.revision] = staged

    def drop(self, revision: Revision) -> None:
        """Frees its memory. No step may name it afterwards."""
        self._staged.pop(revision, None)

    @contextmanager
    def on(self, revision: Revision) -> Iterator[None]:
        """Holds the lock with `revision` in the weights. Blocks; never call it on an event loop."""
        with self._lock:
            if self.slot.revision != revision:
                self.slot.commit(self._staged[revision])
                self.commits += 1
            yield

    def commit_and_verify(self, revision: Revision) -> tuple[Receipt, float]:
        """Commits `revision` and compares every byte. Returns the receipt and seconds of verifying.

        Raises:
            VerifyFailed: the weights hold the same revision as before.
        """
        with self._lock:
            # the revision in the weights has no staged image if it was dropped after its last step
            before = self._staged.get(self.slot.revision) or self.slot.stage(self.slot.live)
            receipt = self.slot.commit(self._staged[revision])
            began = time.monotonic()
            try:
                self.slot.verify()
            except BaseException:
                self.slot.commit(before)
                raise
            return receipt, time.monotonic() - began


class FairLock:
    """A lock that goes to the thread that has waited longest."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    @property
    def waiting(self) -> int:
        """Threads that wait for the lock."""
        return len(self._waiting)

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._waiting.append(ticket)
        ticket.acquire()  # released by the previous holder, which leaves the lock held for us

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
