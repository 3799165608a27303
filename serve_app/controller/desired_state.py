"""The desired state of the fleet. Every decision is journaled before a replica receives it.

Around the pure rollout machine: one decision at a time. It calls no replica.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from hotswap_lib import BASE, Revision
from serve_app.controller.journal import Journal, JournalEntry
from serve_app.rollout.documents import Documents
from serve_app.rollout.events import Event, UserRequest
from serve_app.rollout.machine import advance
from serve_app.rollout.recovery import rebuilt
from serve_app.rollout.state import Desired, Fleet

logger = logging.getLogger(__name__)


class DesiredState:
    """The machine's state, and the sources of its adapters. For one event loop.

    Attributes:
        fleet: the state after the last decision that was journaled.
        sources: revision → the path, Hub id or URI that it was accepted from.
        decided: a user has requested something, from this controller or an earlier one.
    """

    def __init__(self, journal: Journal, *, declared: str | None) -> None:
        self.fleet = Fleet(stable=BASE.key, history=(BASE.key,))
        self.sources: dict[str, str] = {}
        self.decided = False
        self._rebuilt_from = (0, 0)  # the newest (epoch, generation) that was taken over
        self._mine: dict[int, int] = {}  # epoch of this controller → its last generation
        self._journal = journal
        self._declared = declared
        self._documents: Documents | None = None
        self._lock = asyncio.Lock()

    async def decide(self, event: Event) -> Fleet:
        """The fleet after the event. Raises what `advance` and `Journal.write` raise."""
        async with self._lock:
            before = self.fleet
            after = advance(before, event)
            if replace(after, observed={}) != replace(before, observed={}):
                await self.write(after)
            else:
                self.fleet = after
            self.decided = self.decided or isinstance(event, UserRequest)
            return after

    def document(self, replica: str) -> Desired:
        """The replica's part of the desired state."""
        # made once per decision, because every replica asks
        if self._documents is None or self._documents.fleet is not self.fleet:
            self._documents = Documents(self.fleet)
        return self._documents.of(replica)

    def explains(self, document: Desired) -> bool:
        """Returns True if the document was decided here or earlier, or was taken over."""
        # a later generation than it ever had: where all is lost, numbers of epochs begin anew
        if document.epoch >= self.fleet.epoch or document.epoch in self._mine:
            return document.generation <= self._mine.get(document.epoch, -1)
        return self.decided or (document.epoch, document.generation) <= self._rebuilt_from

    async def rebuild(self, documents: Mapping[str, Desired]) -> bool:
        """Takes over the documents that replicas act on, if the journal does not explain them.

        Replicas refuse every document that is older than theirs. A controller that has decided
        nothing yet takes over their state; else its decisions are repeated in a newer epoch.

        Returns:
            False if every document is explained by now.

        Raises:
            Fenced: no journal was lost; another controller made these decisions.
        """
        async with self._lock:
            unknown = {name for name, one in documents.items() if not self.explains(one)}
            if not unknown:  # another replica's report was faster
                return False
            await asyncio.to_thread(self._journal.check, self.fleet.epoch)
            newest = max((documents[name] for name in unknown), key=_number)
            epoch = await asyncio.to_thread(
                self._journal.claim, after=max(newest.epoch, self.fleet.epoch)
            )
            if self.decided:
                await self.write(replace(self.fleet, epoch=epoch))
            else:
                await self._take_over(documents, unknown, newest=newest, epoch=epoch)
            return True

    async def _take_over(
        self, documents: Mapping[str, Desired], unknown: set[str], *, newest: Desired, epoch: int
    ) -> None:
        # replicas that already follow this controller say nothing about the lost journal
        weighed = {
            name: document if name in unknown else replace(document, epoch=0)
            for name, document in documents.items()
        }
        fleet = replace(rebuilt(weighed, at=time.time()), epoch=epoch)
        self.sources.update(dict(newest.sources))
        logger.warning(f"rebuilt from {len(unknown)} replicas: stable {_short(fleet.stable)}")
        await self.write(fleet)
        self._rebuilt_from = _number(newest)
        self._mine = {own: last for own, last in self._mine.items() if own > newest.epoch}

    async def write(self, fleet: Fleet) -> None:
        """Journals the fleet, then makes it the desired state. For `decide`, and for the start.

        Raises `Fenced` if another controller has taken over.
        """
        referenced = references(fleet)
        # only of those, or the journal would grow with every rollout
        sources = {name: where for name, where in self.sources.items() if name in referenced}
        entry = JournalEntry(fleet=fleet, declared=self._declared, sources=sources)
        await asyncio.to_thread(self._journal.write, entry)
        _log(self.fleet, fleet)
        # keep the sources of revisions that a request in progress has just added
        for name in references(self.fleet) - referenced:
            self.sources.pop(name, None)
        self._mine[fleet.epoch] = fleet.generation
        self.fleet = fleet

    def referenced(self) -> set[str]:
        """Revisions that the fleet refers to; their adapters are stored."""
        return references(self.fleet)

    def needed(self) -> set[str]:
        """Revisions that a replica may be assigned soon; their images are kept."""
        fleet = self.fleet
        held = {fleet.stable, *fleet.assigned.values(), *fleet.loaded, *_target(fleet)}
        return held | set(fleet.history[-2:])


def references(fleet: Fleet) -> set[str]:
    """Revisions that a request may name, or that replicas hold."""
    targets = {rollout.target for rollout in fleet.past} | _target(fleet)
    return {fleet.stable, *fleet.history, *fleet.loaded, *fleet.assigned.values(), *targets}


def _number(document: Desired) -> tuple[int, int]:
    return document.epoch, document.generation


def _target(fleet: Fleet) -> set[str]:
    return {fleet.rollout.target} if fleet.rollout else set()


def _log(before: Fleet, after: Fleet) -> None:
    was, now = before.rollout, after.rollout
    if now is not None and (was is None or (was.id, was.state) != (now.id, now.state)):
        why = f" ({now.reason})" if now.reason else ""
        target = _short(now.target)
        fields = {"rollout": now.id, "revision": target}
        logger.info(f"{now.id} to {target}: {now.state}{why}", extra=fields)
    for name in after.loaded:
        if name not in before.loaded:
            logger.info(f"loaded adapter {_short(name)}", extra={"revision": _short(name)})
    for name in before.loaded:
        if name not in after.loaded:
            logger.info(f"unloaded adapter {_short(name)}", extra={"revision": _short(name)})


def _short(revision: str) -> str:
    return str(Revision.parse(revision))
