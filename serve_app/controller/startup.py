"""The fleet that a new controller begins with: from the journal, or the declared adapter."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from hotswap_lib import BASE, Adapter, Revision, load_adapter
from serve_app.controller.core import Core
from serve_app.controller.desired_state import references
from serve_app.controller.journal import JournalEntry, JournalUnreadable
from serve_app.rollout.recovery import redeclared, restored
from serve_app.rollout.state import Fleet
from serve_app.settings import Settings

logger = logging.getLogger(__name__)


class Startup:
    """Writes the first entry of a controller into the journal.

    Attributes:
        warnings: sentences for operators, such as a journal that was unreadable.
    """

    def __init__(self, core: Core, settings: Settings) -> None:
        self.warnings: list[str] = []
        self._settings = settings
        self._desired_state = core.desired_state
        self._journal = core.journal
        self._store = core.store
        self._retention = core.retention

    async def run(self) -> None:
        """Resumes from the journal, or begins with the declared adapter.

        Raises:
            AdapterRefused: the declared adapter cannot be read. The journal is unchanged.
        """
        entry = await self._read()
        # before the epoch is claimed, because that stops the other controller
        declared = None if self._resumes(entry) else await self._declared()
        before = 0 if entry is None else entry.fleet.epoch
        epoch = await asyncio.to_thread(self._journal.claim, after=before)
        entry = await self._read() or entry  # the other controller's decisions until then
        if entry is not None:
            self._desired_state.sources = {**entry.sources, **self._desired_state.sources}
            self._desired_state.decided = True
            self._retention.resume(references(entry.fleet))
        if entry is not None and self._resumes(entry):
            fleet = restored(entry.fleet, at=time.time())
            logger.info(f"resumed as epoch {epoch}, stable {Revision.parse(fleet.stable)}")
        else:
            fleet = declared or await self._declared()
            if entry is not None:
                fleet = redeclared(entry.fleet, fleet, at=time.time())
        await self._desired_state.write(replace(fleet, epoch=epoch))

    async def _read(self) -> JournalEntry | None:
        """The journal. An unreadable one is put aside; the fleet is rebuilt from the replicas."""
        try:
            return await asyncio.to_thread(self._journal.read)
        except JournalUnreadable as error:
            aside = await asyncio.to_thread(self._journal.set_aside)
            self.warnings.append(f"{error}; it is now at {aside}")
            logger.warning(self.warnings[-1])
            return None

    def _resumes(self, entry: JournalEntry | None) -> bool:
        """A declared adapter wins only if it was changed since the journal was written."""
        return entry is not None and entry.declared == self._settings.adapter

    async def _declared(self) -> Fleet:
        source, fleet = self._settings.adapter, self._desired_state.fleet
        if source is None or source == BASE.name:
            return fleet
        adapter: Adapter = await asyncio.to_thread(
            load_adapter, source, name=self._settings.adapter_name
        )
        await asyncio.to_thread(self._store.keep, adapter)
        stable = adapter.revision.key
        self._desired_state.sources[stable] = source
        return replace(fleet, stable=stable, history=(BASE.key, stable))
