"""User requests about rollouts: start, promote, abort, pause, resume, retry, undo.

Between the handle's methods (`deployment`) and the rollout machine. Plans are completed with what
this fleet can do, adapters are checked, and a request that was made before is recognized by its
idempotency key. Every refusal comes before anything has changed.
"""

from __future__ import annotations

import asyncio
import time
from typing import Unpack

from hotswap_lib import BASE, Revision, load_adapter
from serve_app.controller import rollout_history as history
from serve_app.controller.analysis import CanaryAnalysis
from serve_app.controller.core import Core
from serve_app.controller.fleet_view import rollout_view
from serve_app.controller.probing import Probing
from serve_app.rollout.errors import IllegalEvent
from serve_app.rollout.events import (
    AbortRequested,
    AnyRolloutRequest,
    PauseRequested,
    PromoteRequested,
    ResumeRequested,
    RetryRequested,
    StartRequested,
)
from serve_app.rollout.plan import Plan
from serve_app.rollout.precondition import Precondition, PreconditionArgs
from serve_app.rollout.state import Fleet, Rollout, State
from serve_app.settings import Settings
from serve_app.wire.admin import RolloutView
from serve_app.wire.errors import FleetNotReady, KeyReused, PlanImpossible


class RolloutRequests:
    """For one event loop.

    Every method that changes something takes a precondition as keyword arguments, and raises
    `GenerationMismatch` when the fleet is at another generation. An idempotency key belongs to one
    verb of one rollout.
    """

    def __init__(
        self,
        core: Core,
        settings: Settings,
        *,
        analysis: CanaryAnalysis,
        probing: Probing,
    ) -> None:
        self._settings = settings
        self._desired_state = core.desired_state
        self._decisions = core.decisions
        self._reports = core.reports
        self._shelf = core.shelf
        self._analysis = analysis
        self._probing = probing

    async def start(self, plan: Plan, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Checks plan and adapter, then starts a rollout.

        Raises, before anything has changed:
            PlanImpossible: this fleet cannot do what the plan says.
            ProbeInvalid: a function that the plan names does not exist.
            FleetNotReady: no replica has reported, so the adapter cannot be checked.
            AdapterRefused: no replica could hold it.
            GenerationMismatch: the fleet is at another generation than expected.
            KeyReused: the key belongs to a rollout with another plan.
        """
        plan, precondition = _resolved(plan, self._settings), Precondition(**given)
        key = precondition.scoped("start").key
        if (known := history.started_with(self._fleet(), key)) is not None:
            return self._same(known, plan, precondition)
        if not self._fleet().observed:
            raise FleetNotReady
        if plan.placement == "dedicated" and len(self._fleet().observed) < 2:
            raise PlanImpossible("a dedicated canary needs two replicas, and the fleet has one")
        if plan.analysis is not None and plan.analysis.probes:
            await self._probing.check([probe.function for probe in plan.analysis.probes])
        revision = BASE
        if plan.adapter != BASE.name:
            adapter = await asyncio.to_thread(load_adapter, plan.adapter, name=plan.name)
            revision = await self._shelf.accept(adapter)
        return await self._begin(plan, revision, "start", precondition)

    async def undo(
        self, *, to: str | None = None, **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """Aborts the running rollout; else rolls back to the stable revision before this one.

        `to`: the earlier revision to roll back to (`name`, `name@digest8` or in full), even if a
        rollout runs. Raises `NothingToUndo`, and what `start` raises.
        """
        precondition = Precondition(**given)
        known = history.started_with(self._fleet(), precondition.scoped("undo").key)
        if known is not None:
            if to is not None and not Revision.parse(known.target).matches(to):
                raise KeyReused(str(precondition.key))
            return self._view(known)
        for one in history.all_rollouts(self._fleet()):
            if precondition.scoped(f"undo {one.id}").key in self._fleet().keys:
                return self._view(one)  # the same undo has aborted it
        if to is None and (running := self._fleet().running) is not None:
            scoped = precondition.scoped(f"undo {running.id}")
            return await self._abort(running.id, "undone", scoped)
        revision = history.revision_to_undo_to(self._fleet(), to)
        await self._pack(revision)  # a stored copy that is gone is refused here
        plan = Plan(
            adapter=self._desired_state.sources.get(revision.key, revision.name),
            name=revision.name or None,
            in_flight=history.undo_in_flight(self._fleet()),
        )
        return await self._begin(_resolved(plan, self._settings), revision, "undo", precondition)

    async def abort(
        self, id: str, reason: str = "aborted by request", **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """Sends every replica back to stable; does nothing when the rollout has ended."""
        return await self._abort(id, reason, Precondition(**given).scoped(f"abort {id}"))

    async def promote(
        self, id: str, *, full: bool = False, **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """Leaves the current step, whatever its analysis says; `full`: leaves all steps.

        Raises `IllegalEvent` when there is none, or the rollout is aborting.
        """
        scoped = Precondition(**given).scoped(f"promote {id}")
        return await self._request(
            PromoteRequested(id=id, full=full, precondition=scoped, at=time.time())
        )

    async def pause(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Stays in the current step and sends no further replica to the target.

        The progress deadline does not run meanwhile.
        """
        scoped = Precondition(**given).scoped(f"pause {id}")
        return await self._request(PauseRequested(id=id, precondition=scoped, at=time.time()))

    async def resume(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Continues after `pause`."""
        scoped = Precondition(**given).scoped(f"resume {id}")
        return await self._request(ResumeRequested(id=id, precondition=scoped, at=time.time()))

    async def retry(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Repeats the step that failed; a rollout that has ended starts again as a new one."""
        precondition = Precondition(**given)
        rollout, scoped = history.find(self._fleet(), id), precondition.scoped(f"retry {id}")
        if (known := history.started_with(self._fleet(), scoped.key)) is not None:
            return self._view(known)
        if not rollout.ended or scoped.key in self._fleet().keys:
            return await self._request(RetryRequested(id=id, precondition=scoped, at=time.time()))
        if rollout.state is State.SUCCEEDED:
            raise IllegalEvent("to retry", f"{id} has succeeded")
        revision = Revision.parse(rollout.target)
        await self._pack(revision)
        return await self._begin(rollout.plan, revision, f"retry {id}", precondition)

    async def rollout(self, id: str) -> RolloutView:
        """Raises `RolloutNotFound`."""
        return self._view(history.find(self._fleet(), id))

    async def rollouts(self) -> list[RolloutView]:
        """Newest first."""
        return [self._view(one) for one in reversed(history.all_rollouts(self._fleet()))]

    # ---- inside -----------------------------------------------------------------------------

    def _fleet(self) -> Fleet:
        """Raises `Fenced` if another controller has taken over and may know more."""
        self._decisions.check_fenced()
        return self._desired_state.fleet

    async def _begin(
        self, plan: Plan, revision: Revision, request: str, precondition: Precondition
    ) -> RolloutView:
        scoped = precondition.scoped(request)
        self._desired_state.sources[revision.key] = plan.adapter
        fleet = self._fleet()
        if scoped.key in fleet.keys and history.started_with(fleet, scoped.key) is None:
            raise KeyReused(str(precondition.key))  # its rollout is no longer remembered
        await self._decisions.decide(
            StartRequested(plan=plan, target=revision.key, precondition=scoped, at=time.time())
        )
        if (known := history.started_with(self._fleet(), scoped.key)) is not None:
            return self._same(known, plan, precondition)  # this one, or one that was faster
        rollout = self._fleet().rollout
        assert rollout is not None
        return self._view(rollout)

    async def _abort(self, id: str, reason: str, scoped: Precondition) -> RolloutView:
        if history.find(self._fleet(), id).ended:
            return await self.rollout(id)
        return await self._request(
            AbortRequested(id=id, reason=reason, precondition=scoped, at=time.time())
        )

    async def _request(self, request: AnyRolloutRequest) -> RolloutView:
        """Raises `RolloutNotFound`, and `IllegalEvent` if it is not the running rollout."""
        history.find(self._fleet(), request.id)
        await self._decisions.decide(request)
        return await self.rollout(request.id)

    def _same(self, known: Rollout, plan: Plan, precondition: Precondition) -> RolloutView:
        if known.plan != plan:
            raise KeyReused(str(precondition.key))
        return self._view(known)

    async def _pack(self, revision: Revision) -> None:
        """Raises `RevisionLost` when the stored adapter is gone or has changed."""
        for fingerprint in {report.layout for report in self._reports.last().values()}:
            await self._shelf.get(revision, fingerprint)

    def _view(self, rollout: Rollout) -> RolloutView:
        fleet, analysis = self._desired_state.fleet, self._analysis
        return rollout_view(fleet, rollout, latest=analysis.latest, stats=analysis.stats)


def _resolved(plan: Plan, settings: Settings) -> Plan:
    """The plan with the fleet's defaults for open fields. Raises `PlanImpossible`."""
    # an encoder keeps nothing of a request between two steps
    both = settings.task in ("embed", "classify") or settings.lanes >= 2
    for field, value in (("in_flight", "overlap"), ("placement", "shared")):
        if getattr(plan, field) == value and not both:
            raise PlanImpossible(f"{field}={value!r} needs two lanes, and the fleet has lanes=1")
    update: dict[str, object] = {"in_flight": plan.in_flight or ("overlap" if both else "drain")}
    if plan.strategy == "canary":
        update["placement"] = plan.placement or ("shared" if both else "dedicated")
    return plan.model_copy(update=update)
