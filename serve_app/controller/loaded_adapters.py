"""Loaded adapters: every replica serves them for requests that name them.

Behind the controller's methods in vLLM's terms. A load is a decision like any other: journaled,
then sent to every replica. These methods wait until the replicas have carried it out, and take it
back when one of them cannot.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from hotswap_lib import BASE, AdapterNameInvalid, Revision, load_adapter
from serve_app.controller.core import Core
from serve_app.controller.open_reports import OpenReport
from serve_app.rollout.events import LoadRequested, UnloadRequested
from serve_app.rollout.precondition import Precondition
from serve_app.wire.admin import AdapterView
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    AdapterNotLoaded,
    FleetNotReady,
)


class LoadedAdapters:
    """For one event loop.

    Args:
        timeout_s: how long a load or an unload waits for the replicas.
    """

    def __init__(
        self,
        core: Core,
        *,
        timeout_s: float,
    ) -> None:
        self._desired_state = core.desired_state
        self._decisions = core.decisions
        self._reports = core.reports
        self._shelf = core.shelf
        self._tasks = core.tasks
        self._timeout_s = timeout_s
        self._naming = asyncio.Lock()  # from the look-up of a name to the decision about it

    async def load(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_generation: int | None = None,
    ) -> AdapterView:
        """Loads an adapter; returns when every live replica serves it.

        The content that is loaded under the name already is a success. `load_inplace` lets it
        replace another content. It goes on if the caller is cancelled.

        Raises, before anything has changed:
            FleetNotReady: no replica has reported, so the adapter cannot be checked.
            AdapterRefused: no replica could hold it, or the name is not allowed.
            AdapterAlreadyLoaded: another content has that name.
            GenerationMismatch: the fleet is at another generation than expected.

        Raises, after the earlier content of the name is back:
            AdapterLoadFailed: a replica cannot serve it.
            AdapterLoadTimeout: some replicas did not serve it in time.
        """
        if not self._desired_state.fleet.observed:
            raise FleetNotReady
        given = Precondition(expected_generation=expected_generation)
        return await self._tasks.complete(
            self._load(name, path, load_inplace=load_inplace, precondition=given)
        )

    async def unload(self, name: str, *, expected_generation: int | None = None) -> AdapterView:
        """Unloads an adapter; its running requests finish. Goes on if the caller is cancelled.

        Raises:
            AdapterNotLoaded: no adapter is loaded under the name.
            GenerationMismatch: the fleet is at another generation than expected.
        """
        given = Precondition(expected_generation=expected_generation)
        return await self._tasks.complete(self._unload(name, precondition=given))

    def views(self) -> list[AdapterView]:
        """In the order in which they were loaded. Raises `Fenced`."""
        self._decisions.check_fenced()
        return [self._view(revision) for revision in self._desired_state.fleet.loaded]

    # ---- inside -----------------------------------------------------------------------------

    async def _load(
        self, name: str, path: str, *, load_inplace: bool, precondition: Precondition
    ) -> AdapterView:
        _check(name)
        adapter = await asyncio.to_thread(load_adapter, path, name=name)
        revision = (await self._shelf.accept(adapter)).key
        async with self._naming:
            before = self._named(name)
            came_from = self._desired_state.sources.get(before or "", "")
            if before not in (None, revision) and not load_inplace:
                raise AdapterAlreadyLoaded(name, _short(str(before)), _short(revision))
            self._desired_state.sources[revision] = path
            earlier = dict(self._reports.items())
            await self._decisions.decide(
                LoadRequested(
                    revision=revision,
                    instead_of=None if before == revision else before,
                    precondition=precondition,
                    at=time.time(),
                )
            )
            since = self._desired_state.fleet.generation
        try:
            await self._until_served(revision, since=since, earlier=earlier)
        except (AdapterLoadFailed, AdapterLoadTimeout):
            if before != revision:  # else it was loaded before this call, and stays
                await self._take_back(revision, before, came_from=came_from)
            raise
        return self._view(revision)

    async def _unload(self, name: str, *, precondition: Precondition) -> AdapterView:
        async with self._naming:
            revision = self._named(name)
            if revision is None:
                raise AdapterNotLoaded(name)
            view = self._view(revision)
            await self._decisions.decide(
                UnloadRequested(revision=revision, precondition=precondition, at=time.time())
            )
        with suppress(TimeoutError):  # it is journaled, so a late replica will drop it as well
            async with asyncio.timeout(self._timeout_s):
                await self._reports.until(lambda: not self._may_be_served(revision))
        ready = self._ready(revision)
        return view.model_copy(
            update={"generation": self._desired_state.fleet.generation, "ready": ready}
        )

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
        """The number of replicas that serve it, by their latest reports."""
        last = self._reports.last()
        return sum(
            revision in last[replica].state.served
            for replica in self._desired_state.fleet.observed
            if replica in last
        )

    # ---- waiting for replicas -----------------------------------------------------------------

    async def _until_served(
        self, revision: str, *, since: int, earlier: dict[str, OpenReport]
    ) -> None:
        def served() -> bool:
            self._raise_if_failed(revision, since=since, earlier=earlier)
            live = self._desired_state.fleet.observed.keys()
            return bool(live) and self._serving(revision) == live

        try:
            async with asyncio.timeout(self._timeout_s):
                await self._reports.until(served)
        except TimeoutError:
            waiting = sorted(self._desired_state.fleet.observed.keys() - self._serving(revision))
            raise AdapterLoadTimeout(_short(revision), tuple(waiting), self._timeout_s) from None

    def _raise_if_failed(
        self, revision: str, *, since: int, earlier: dict[str, OpenReport]
    ) -> None:
        if revision not in self._desired_state.fleet.loaded:
            raise AdapterLoadFailed(_short(revision), "it was unloaded meanwhile")
        for replica, opened in self._reports.items():
            if earlier.get(replica) is opened:  # from before this load
                continue
            for failure in opened.report.state.refused:
                if failure.revision == revision and failure.generation >= since:
                    why = f"replica {replica}: {failure.reason}"
                    raise AdapterLoadFailed(_short(revision), why)

    def _serving(self, revision: str) -> set[str]:
        reports = self._reports.of(self._desired_state.fleet.observed)
        return {replica for replica, one in reports.items() if one and one.serves(revision)}

    def _may_be_served(self, revision: str) -> bool:
        if revision in self._desired_state.fleet.loaded:  # loaded again meanwhile
            return False
        reports = self._reports.of(self._desired_state.fleet.observed)
        return any(one is None or one.may_serve(revision) for one in reports.values())

    async def _take_back(self, revision: str, before: str | None, *, came_from: str) -> None:
        async with self._naming:
            if revision not in self._desired_state.fleet.loaded:  # another request unloaded it
                return
            if before is None:
                await self._decisions.decide(UnloadRequested(revision=revision, at=time.time()))
            else:
                self._desired_state.sources[before] = came_from
                await self._decisions.decide(
                    LoadRequested(revision=before, instead_of=revision, at=time.time())
                )


def _check(name: str) -> None:
    if name == BASE.name or not name or set(name) & set(":@/"):
        rule = "a loaded adapter's name is not empty, not 'base', and has no ':', '@' or '/' in it"
        raise AdapterNameInvalid(name, None, rule)


def _short(revision: str) -> str:
    return str(Revision.parse(revision))
