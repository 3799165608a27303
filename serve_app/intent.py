"""The intent: what the fleet shall hold, in the journal before anybody hears of it.

Around the pure machine: one decision at a time, each written down before it is what the controller
goes by. Knows no replica; `serve_app.controller` feeds it and tells the replicas.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from hotswap_lib import BASE

from .journal import Entry, Journal
from .messages import from_key, key
from .rollout.events import Event
from .rollout.machine import advance
from .rollout.state import Fleet

logger = logging.getLogger("ray.serve")


class Intent:
    """The machine's state and where its adapters came from. For one event loop.

    Attributes:
        fleet: what was decided and written down.
        sources: revision → the path, Hub id or URI that it was accepted from.
    """

    def __init__(self, journal: Journal, *, declared: str | None) -> None:
        self.fleet = Fleet(stable=key(BASE), history=(key(BASE),))
        self.sources: dict[str, str] = {}
        self._journal = journal
        self._declared = declared
        self._lock = asyncio.Lock()

    async def decide(self, event: Event) -> Fleet:
        """The fleet after the event. Raises what `advance` raises, and whatever writing raises."""
        async with self._lock:
            before, after = self.fleet, advance(self.fleet, event)
            if replace(after, observed={}) != replace(before, observed={}):
                await self.write(after)
            else:
                self.fleet = after
            return after

    async def outrank(self, epoch: int) -> None:
        """Begin a newer epoch than one that replicas know of: they refuse whatever is older."""
        if epoch <= self.fleet.epoch:
            return
        async with self._lock:
            if epoch > self.fleet.epoch:  # else another replica's report was faster
                await self.write(replace(self.fleet, epoch=epoch + 1))

    async def write(self, fleet: Fleet) -> None:
        """Journal it, then go by it. Outside of `decide` only while nobody else decides."""
        # of those that somebody could name, or the journal would grow with every rollout
        known = {*fleet.history, *fleet.loaded, *_target(fleet)}
        self.sources = {name: where for name, where in self.sources.items() if name in known}
        entry = Entry(fleet=fleet, declared=self._declared, sources=self.sources)
        await asyncio.to_thread(self._journal.write, entry)
        _log(self.fleet, fleet)
        self.fleet = fleet

    def needed(self) -> set[str]:
        """Revisions that a replica can be told to hold, soon or again."""
        fleet = self.fleet
        held = {fleet.stable, *fleet.assigned.values(), *fleet.loaded, *_target(fleet)}
        return held | set(fleet.history[-2:])


def _target(fleet: Fleet) -> set[str]:
    return {fleet.rollout.target} if fleet.rollout else set()


def _log(before: Fleet, after: Fleet) -> None:
    was, now = before.rollout, after.rollout
    if now is not None and (was is None or (was.id, was.state) != (now.id, now.state)):
        why = f" ({now.reason})" if now.reason else ""
        logger.info(f"{now.id} to {from_key(now.target)}: {now.state}{why}")
    for name in after.loaded:
        if name not in before.loaded:
            logger.info(f"loaded beside the default: {from_key(name)}")
    for name in before.loaded:
        if name not in after.loaded:
            logger.info(f"unloaded: {from_key(name)}")
