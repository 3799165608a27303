"""The intent: what the fleet shall hold, in the journal before anybody hears of it.

Around the pure machine: one decision at a time, each written down before it is what the controller
goes by. Knows no replica; `serve_app.controller.deployment` feeds it and tells the replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from hotswap_lib import BASE, Revision
from serve_app.controller.journal import Journal, JournalEntry
from serve_app.rollout.events import Event, UserRequest
from serve_app.rollout.machine import advance
from serve_app.rollout.recovery import rebuilt
from serve_app.rollout.state import Desired, Fleet

logger = logging.getLogger(__name__)
Check = Callable[[Fleet], None]


class DesiredState:
    """The machine's state and where its adapters came from. For one event loop.

    Attributes:
        fleet: what was decided and written down.
        sources: revision → the path, Hub id or URI that it was accepted from.
        decided: users have asked for something since this controller started, or before.
    """

    def __init__(self, journal: Journal, *, declared: str | None) -> None:
        self.fleet = Fleet(stable=BASE.key, history=(BASE.key,))
        self.sources: dict[str, str] = {}
        self.decided = False
        self._rebuilt_from = (0, 0)  # the newest (epoch, generation) that was taken over
        self._mine: dict[int, int] = {}  # epoch of this controller → its last generation
        self._journal = journal
        self._declared = declared
        self._lock = asyncio.Lock()

    async def decide(self, event: Event, *, check: Check | None = None) -> Fleet:
        """The fleet after the event. `check`: refuses it by raising, for the fleet as it is then.

        Raises what `check` and `advance` raise, and whatever writing raises.
        """
        async with self._lock:
            before = self.fleet
            if check is not None:
                check(before)
            after = advance(before, event)
            if replace(after, observed={}) != replace(before, observed={}):
                await self.write(after)
            else:
                self.fleet = after
            self.decided = self.decided or isinstance(event, UserRequest)
            return after

    def knows(self, document: Desired) -> bool:
        """Whether what a replica acts on was decided here, or before, or was taken over."""
        # a later generation than it ever had: where all is lost, numbers of epochs begin anew
        if document.epoch >= self.fleet.epoch or document.epoch in self._mine:
            return document.generation <= self._mine.get(document.epoch, -1)
        return self.decided or (document.epoch, document.generation) <= self._rebuilt_from

    async def learn(self, documents: Mapping[str, Desired]) -> bool:
        """What the replicas act on, and nothing known here explains: a journal was lost.

        They refuse whatever is older than that. A controller that has decided nothing yet takes
        over what they hold; else its decisions are repeated, in a newer epoch. Whether it did.

        Raises:
            Fenced: nothing was lost; another controller has decided it.
        """
        async with self._lock:
            unknown = {name for name, document in documents.items() if not self.knows(document)}
            if not unknown:  # another replica's report was faster
                return False
            await asyncio.to_thread(self._journal.check, self.fleet.epoch)
            newest = max((documents[name] for name in unknown), key=_number)
            epoch = await asyncio.to_thread(
                self._journal.claim, after=max(newest.epoch, self.fleet.epoch)
            )
            if self.decided:
                await self.write(replace(self.fleet, epoch=epoch))
                return True
            # who obeys this controller already says no more about the time before it
            told = {
                name: document if name in unknown else replace(document, epoch=0)
                for name, document in documents.items()
            }
            fleet = replace(rebuilt(told, at=time.time()), epoch=epoch)
            self.sources.update(dict(newest.sources))
            logger.warning(f"rebuilt from {len(unknown)} replicas: stable {_short(fleet.stable)}")
            await self.write(fleet)
            self._rebuilt_from = _number(newest)
            self._mine = {own: last for own, last in self._mine.items() if own > newest.epoch}
            return True

    async def write(self, fleet: Fleet) -> None:
        """Journal it, then go by it. Outside of `decide` only while nobody else decides.

        Raises `Fenced` where another controller has taken over.
        """
        named = known(fleet)
        # of those that somebody could name, or the journal would grow with every rollout
        sources = {name: where for name, where in self.sources.items() if name in named}
        entry = JournalEntry(fleet=fleet, declared=self._declared, sources=sources)
        await asyncio.to_thread(self._journal.write, entry)
        _log(self.fleet, fleet)
        # what nobody knew before is being asked for right now
        for name in known(self.fleet) - named:
            self.sources.pop(name, None)
        self._mine[fleet.epoch] = fleet.generation
        self.fleet = fleet

    def needed(self) -> set[str]:
        """Revisions that a replica can be told to hold, soon or again."""
        fleet = self.fleet
        held = {fleet.stable, *fleet.assigned.values(), *fleet.loaded, *_target(fleet)}
        return held | set(fleet.history[-2:])


def known(fleet: Fleet) -> set[str]:
    """Revisions that somebody could name: to have them again, or because replicas hold them."""
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
        logger.info(f"{now.id} to {Revision.parse(now.target)}: {now.state}{why}")
    for name in after.loaded:
        if name not in before.loaded:
            logger.info(f"loaded beside the default: {Revision.parse(name)}")
    for name in before.loaded:
        if name not in after.loaded:
            logger.info(f"unloaded: {Revision.parse(name)}")


def _short(revision: str) -> str:
    return str(Revision.parse(revision))
