"""Stored adapters are deleted some time after the last reference to them is gone.

Not at once: a load that fails brings back the adapter that it replaced, and the adapter of a new
rollout is stored before the rollout refers to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from hotswap_lib import Revision
from serve_app.controller.background import BackgroundTasks
from serve_app.controller.images import AdapterStore

logger = logging.getLogger(__name__)
GRACE_S = 300.0  # longer than a load or a rollout takes to fail and to go back


class AdapterRetention:
    """Follows which revisions are referred to, and deletes the others from the store.

    Args:
        referenced: the revisions that the fleet refers to now (`DesiredState.referenced`).
        grace_s: time between the last reference and the deletion.
    """

    def __init__(
        self,
        store: AdapterStore,
        *,
        referenced: Callable[[], set[str]],
        tasks: BackgroundTasks,
        grace_s: float,
    ) -> None:
        self._store = store
        self._referenced = referenced
        self._tasks = tasks
        self._grace_s = grace_s
        self._stored: set[str] = set()
        self._unreferenced: dict[str, float] = {}  # digest → since when

    def resume(self, revisions: Iterable[str]) -> None:
        """The journal of an earlier controller refers to these."""
        self._stored = _digests(revisions)

    def update(self, *, at: float) -> None:
        """Call it after each decision."""
        before, self._stored = self._stored, _digests(self._referenced())
        self._unreferenced |= dict.fromkeys(before - self._stored, at)

    def tick(self, *, at: float) -> None:
        """Start the deletion of adapters whose grace is over."""
        due = {one for one, since in self._unreferenced.items() if at - since >= self._grace_s}
        if due:
            self._unreferenced = {n: s for n, s in self._unreferenced.items() if n not in due}
            self._tasks.start(asyncio.to_thread(self._delete, due))

    def _delete(self, digests: set[str]) -> None:
        try:
            # as it is by then: a request may have referred to one of them again
            self._store.drop(digests, unless=lambda: _digests(self._referenced()))
        except Exception as error:  # they only take up space
            logger.warning(f"could not delete the adapters {sorted(digests)}: {error}")


def _digests(revisions: Iterable[str]) -> set[str]:
    return {Revision.parse(key).digest for key in revisions}
