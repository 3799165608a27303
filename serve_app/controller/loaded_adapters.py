"""LoadedAdapters: adapters that the fleet serves beside its default, for requests that name them.

Behind the controller's methods in vLLM's terms. Loading is an intent like any other: decided,
journaled, told to every replica; what is here waits for the replicas to have done it, and takes it
back when one of them cannot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from hotswap_lib import BASE, AdapterNameInvalid, Revision, load_adapter
from serve_app.controller.desired_state import DesiredState
from serve_app.controller.images import ImageShelf
from serve_app.controller.open_reports import OpenReport, OpenReports
from serve_app.rollout.events import Event, LoadRequested, UnloadRequested
from serve_app.wire.admin import AdapterView
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    AdapterNotLoaded,
)


class LoadedAdapters:
    """What is loaded, by name. `feed` takes an event to the machine, to the end."""

    def __init__(
        self,
        intent: DesiredState,
        reports: OpenReports,
        shelf: ImageShelf,
        *,
        feed: Callable[[Event], Awaitable[None]],
        timeout_s: float,
    ) -> None:
        self._desired_state = intent
        self._reports = reports
        self._shelf = shelf
        self._feed = feed
        self._timeout_s = timeout_s
        self._choosing = asyncio.Lock()  # from looking at what has a name to having decided on it

    async def load(
        self, name: str, path: str, *, load_inplace: bool, expected_generation: int | None
    ) -> AdapterView:
        """See `Controller.load_adapter`."""
        _check(name)
        adapter = await asyncio.to_thread(load_adapter, path, name=name)
        revision = (await self._shelf.accept(adapter)).key
        async with self._choosing:
            before = self._named(name)
            came_from = self._desired_state.sources.get(before or "", "")
            if before not in (None, revision) and not load_inplace:
                raise AdapterAlreadyLoaded(name, _short(str(before)), _short(revision))
            self._desired_state.sources[revision] = path
            said_before = dict(self._reports.items())
            await self._feed(
                LoadRequested(
                    revision=revision,
                    instead_of=None if before == revision else before,
                    expected_generation=expected_generation,
                    at=time.time(),
                )
            )
            since = self._desired_state.fleet.generation
        try:
            await self._until_served(revision, since=since, said_before=said_before)
        except (AdapterLoadFailed, AdapterLoadTimeout):
            if before != revision:  # else it was there before this call, and stays
                await self._take_back(revision, before, came_from=came_from)
            raise
        return self._view(revision)

    async def unload(self, name: str, *, expected_generation: int | None) -> AdapterView:
        """See `Controller.unload_adapter`."""
        async with self._choosing:
            revision = self._named(name)
            if revision is None:
                raise AdapterNotLoaded(name)
            view = self._view(revision)
            await self._feed(
                UnloadRequested(
                    revision=revision, expected_generation=expected_generation, at=time.time()
                )
            )
        with suppress(TimeoutError):  # who has not heard yet will; the intent is written down
            async with asyncio.timeout(self._timeout_s):
                await self._reports.until(lambda: not self._still_named(revision))
        ready = self._ready(revision)
        return view.model_copy(
            update={"generation": self._desired_state.fleet.generation, "ready": ready}
        )

    def views(self) -> list[AdapterView]:
        return [self._view(revision) for revision in self._desired_state.fleet.loaded]

    def _named(self, name: str) -> str | None:
        for revision in self._desired_state.fleet.loaded:
            if Revision.parse(revision).name == name:
                return revision
        return None

    def _view(self, revision: str) -> AdapterView:
        fleet = self._desired_state.fleet
        return AdapterView(
            lora_name=Revision.parse(revision).name,
            lora_path=self._desired_state.sources.get(revision, ""),
            revision=_short(revision),
            generation=fleet.generation,
            ready=self._ready(revision),
            total=len(fleet.observed),
        )

    def _ready(self, revision: str) -> int:
        """How many said last that they serve it; some may have been told to drop it since."""
        last = self._reports.last()
        return sum(
            revision in last[replica].state.served
            for replica in self._desired_state.fleet.observed
            if replica in last
        )

    # ---- waiting for replicas -----------------------------------------------------------------

    async def _until_served(
        self, revision: str, *, since: int, said_before: dict[str, OpenReport]
    ) -> None:
        def served() -> bool:
            self._refuse_failed(revision, since=since, said_before=said_before)
            live = self._desired_state.fleet.observed.keys()
            return bool(live) and self._serving(revision) == live

        try:
            async with asyncio.timeout(self._timeout_s):
                await self._reports.until(served)
        except TimeoutError:
            waiting = sorted(self._desired_state.fleet.observed.keys() - self._serving(revision))
            raise AdapterLoadTimeout(_short(revision), tuple(waiting), self._timeout_s) from None

    def _refuse_failed(
        self, revision: str, *, since: int, said_before: dict[str, OpenReport]
    ) -> None:
        if revision not in self._desired_state.fleet.loaded:
            raise AdapterLoadFailed(_short(revision), "it was unloaded meanwhile")
        for replica, line in self._reports.items():
            if said_before.get(replica) is line:  # it was asked again since
                continue
            for failure in line.report.state.refused:
                if failure.revision == revision and failure.generation >= since:
                    why = f"replica {replica}: {failure.reason}"
                    raise AdapterLoadFailed(_short(revision), why)

    def _serving(self, revision: str) -> set[str]:
        lines = self._reports.of(self._desired_state.fleet.observed)
        return {replica for replica, line in lines.items() if line and line.serves(revision)}

    def _still_named(self, revision: str) -> bool:
        if revision in self._desired_state.fleet.loaded:  # loaded again meanwhile
            return False
        lines = self._reports.of(self._desired_state.fleet.observed)
        return any(line is None or line.names(revision) for line in lines.values())

    async def _take_back(self, revision: str, before: str | None, *, came_from: str) -> None:
        async with self._choosing:
            if revision not in self._desired_state.fleet.loaded:  # somebody else was faster
                return
            if before is None:
                await self._feed(UnloadRequested(revision=revision, at=time.time()))
            else:
                self._desired_state.sources[before] = came_from
                await self._feed(
                    LoadRequested(revision=before, instead_of=revision, at=time.time())
                )


def _check(name: str) -> None:
    if name == BASE.name or not name or set(name) & set(":@/"):
        rule = "a loaded adapter's name is not empty, not 'base', and has no ':', '@' or '/' in it"
        raise AdapterNameInvalid(name, None, rule)


def _short(revision: str) -> str:
    return str(Revision.parse(revision))
