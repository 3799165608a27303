"""WeightLock: several revisions over one set of weights, one step at a time.

Whoever wants a forward pass takes a turn and names a revision. If that is not the live one, its
image is committed first, which is one copy; so a step always runs on the revision that it was meant
for. WeightLock are given in the order in which they were asked for: a busy lane cannot starve another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from hotswap_lib import Receipt, Revision, Slot, Staged


class WeightLock:
    """The staged images of a replica's revisions, and who may run the model now."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.commits = 0  # how often a turn had to change the weights
        self._staged = {slot.revision: slot.stage(slot.live)}
        self._lock = FairLock()

    def add(self, staged: Staged) -> None:
        self._staged[staged.revision] = staged

    def drop(self, revision: Revision) -> None:
        """Free its memory; nobody may ask for a turn on it any more."""
        self._staged.pop(revision, None)

    @contextmanager
    def on(self, revision: Revision) -> Iterator[None]:
        """A turn with `revision` in the weights. Blocks; for threads, never for an event loop."""
        with self._lock:
            if self.slot.revision != revision:
                self.slot.commit(self._staged[revision])
                self.commits += 1
            yield

    def commit_and_verify(self, revision: Revision) -> tuple[Receipt, float]:
        """Commit `revision` and compare every byte. Returns the receipt and seconds of verifying.

        Raises:
            VerifyFailed: the weights hold what they held before.
        """
        with self._lock:
            # not among the staged, if the last turn was on a revision that was dropped since
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
    """A lock that is handed to whoever has waited longest."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._waiting.append(ticket)
        ticket.acquire()  # released by the one before, who leaves the lock held for us

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
