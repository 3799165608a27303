"""Looks at a canary while its step is held, and tells the rollout machine what it saw.

Numbers come from three places: what the replicas counted (`serve_app.controller.canary_stats`), probes that run as
Ray tasks, and Prometheus. What they mean is decided in `serve_app.controller.verdicts`, what follows from it in
the machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import httpx
import ray
from ray.exceptions import RayTaskError

from hotswap_lib import Revision
from serve_app import probes
from serve_app.controller import verdicts as judge
from serve_app.controller.canary_stats import CanaryStats
from serve_app.rollout.analysis import Analysis, Measurement, Outcome, Probe, Query, Verdict
from serve_app.rollout.events import Judged
from serve_app.rollout.state import Fleet, Rollout, State

logger = logging.getLogger(__name__)
_FRESH_S = 1.0
_QUERY_S = 5.0
# whatever is at the address, and whatever it says
_NO_ANSWER = (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, IndexError)


class Probing(Protocol):
    """Runs probe functions somewhere; in production as Ray tasks."""

    async def check(self, functions: Sequence[str]) -> None:
        """Raises `ProbeInvalid` for the first one that is not there."""
        ...

    async def run(
        self, function: str, canary: str, stable: str, options: Mapping[str, Any]
    ) -> dict[str, float]:
        """Its scores. Raises what it raises."""
        ...


class RayProbes:
    """Each probe in a task of its own, anywhere in the cluster, beside the replicas of `app`."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._check = ray.remote(num_cpus=0, max_retries=0)(probes.check)
        self._run = ray.remote(num_cpus=0, max_retries=0)(probes.run)

    async def check(self, functions: Sequence[str]) -> None:
        await _result(self._check.remote(list(functions)))

    async def run(
        self, function: str, canary: str, stable: str, options: Mapping[str, Any]
    ) -> dict[str, float]:
        task = self._run.remote(function, self._app, canary, stable, dict(options))
        try:
            return await _result(task)  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            ray.cancel(task, force=True)
            raise


class CanaryAnalysis:
    """For one event loop. `fresh` has every replica report; `feed` takes an event to the machine.

    Attributes:
        latest: what was seen last of the current step_id, also while nothing follows from it.
    """

    def __init__(
        self,
        step_id: CanaryStats,
        *,
        fleet: Callable[[], Fleet],
        fresh: Callable[[float], Awaitable[None]],
        feed: Callable[[Judged], Awaitable[None]],
        probing: Probing,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.latest: Verdict | None = None
        self._canary_stats = step_id
        self._fleet = fleet
        self._fresh = fresh
        self._feed = feed
        self._probing = probing
        self._transport = transport
        self._looked_at = 0.0
        self._look: asyncio.Task[None] | None = None
        self._probes: dict[int, asyncio.Task[list[Measurement]]] = {}

    def tick(self, *, at: float) -> None:
        """Look, when it is time to; never waits."""
        rollout = self._fleet().running
        self._follow(rollout)
        if rollout is None or (analysis := rollout.plan.analysis) is None:
            return
        if rollout.state not in (State.PROGRESSING, State.PAUSED) or rollout.placed_at is None:
            return
        until = rollout.hold_until
        over = until is not None and self._looked_at < until <= at  # whatever the interval
        due = at - self._looked_at >= analysis.interval or over
        if due and (self._look is None or self._look.done()):
            self._looked_at = at
            self._look = asyncio.create_task(self._judge(rollout, analysis, at=at))

    async def close(self) -> None:
        tasks = [task for task in (self._look, *self._probes.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def verdict(self, rollout: Rollout, measurements: Sequence[Measurement], at: float) -> Verdict:
        """Those measurements, with the share of the requests that the canary got."""
        share, requests = self._canary_stats.share_of(rollout.target)
        step = rollout.current
        return Verdict(
            step=rollout.step,
            weight=100.0 if step is None else step.weight,
            outcome=judge.outcome(measurements),
            at=at,
            measurements=tuple(measurements),
            share=None if share is None else round(share, 2),
            requests=requests,
        )

    def _follow(self, rollout: Rollout | None) -> None:
        step_id = rollout.step_id if rollout is not None and rollout.begun else None
        if step_id == self._canary_stats.name:
            return
        self._canary_stats.open(step_id)
        self.latest = None
        self._looked_at = 0.0
        for task in self._probes.values():
            task.cancel()
        self._probes = {}

    async def _judge(self, rollout: Rollout, analysis: Analysis, *, at: float) -> None:
        try:
            await self._fresh(_FRESH_S)
            canary, stable = (
                self._canary_stats.of(name) for name in (rollout.target, rollout.previous)
            )
            found = await asyncio.to_thread(judge.checks, analysis, canary, stable)
            if (
                rollout.step_id != self._canary_stats.name
            ):  # the probes of another one are none of this
                return
            found += self._probed(rollout, analysis)
            if analysis.queries:
                answers = await self._queried(rollout, analysis)
                found += answers
        except Exception as error:  # whatever it is, it must not pass for a verdict
            logger.exception("the analysis could not be done")
            found = [judge.broken("analysis", str(error) or type(error).__name__)]
        if rollout.step_id == self._canary_stats.name:
            self.latest = self.verdict(rollout, found, at)
            try:
                await self._feed(Judged(step_id=rollout.step_id, verdict=self.latest, at=at))
            except Exception:  # there is another look
                logger.exception("the verdict was not taken")

    # ---- probes -------------------------------------------------------------------------------

    def _probed(self, rollout: Rollout, analysis: Analysis) -> list[Measurement]:
        """What each probe found in this step_id: once; again only if it could not be run."""
        found: list[Measurement] = []
        for index, probe in enumerate(analysis.probes):
            task = self._probes.get(index)
            if task is None:
                task = asyncio.create_task(self._probe(rollout, probe))
                self._probes[index] = task
            if not task.done():
                found.append(judge.broken(probe.function, "is still running"))
                continue
            result = task.result()
            found += result
            if judge.outcome(result) is Outcome.INCONCLUSIVE:
                del self._probes[index]
        return found

    async def _probe(self, rollout: Rollout, probe: Probe) -> list[Measurement]:
        limit = asyncio.timeout(probe.timeout)
        try:
            async with limit:
                scores = await self._probing.run(
                    probe.function, rollout.target, rollout.previous, probe.options
                )
            return judge.scores(probe, scores)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if limit.expired():
                why = f"did not end within {probe.timeout:g} s"
            return [judge.broken(probe.function, why)]

    # ---- Prometheus ---------------------------------------------------------------------------

    async def _queried(self, rollout: Rollout, analysis: Analysis) -> list[Measurement]:
        async with httpx.AsyncClient(transport=self._transport, timeout=_QUERY_S) as http:
            return list(
                await asyncio.gather(
                    *(self._query(http, rollout, each, analysis) for each in analysis.queries)
                )
            )

    async def _query(
        self, http: httpx.AsyncClient, rollout: Rollout, asked: Query, analysis: Analysis
    ) -> Measurement:
        text = asked.query
        for word, revision in (("{canary}", rollout.target), ("{stable}", rollout.previous)):
            text = text.replace(word, str(Revision.parse(revision)))
        try:
            response = await http.get(f"{asked.address}/api/v1/query", params={"query": text})
            response.raise_for_status()
            value = _number(response.json()["data"])
        except _NO_ANSWER as error:
            return judge.broken(asked.query, f"{type(error).__name__}: {error}")
        return judge.query(asked, value, no_data=analysis.no_data)


def _number(data: dict[str, Any]) -> float | None:
    """The value of a scalar, or of a vector with one element. Raises ValueError for more."""
    result = data["result"]
    if data["resultType"] == "vector":
        if not result:
            return None
        if len(result) > 1:
            raise ValueError(f"the query gives {len(result)} values, and one is wanted")
        result = result[0]["value"]
    value = float(result[1])
    return None if value != value else value  # NaN: a rate over nothing


async def _result(task: Any) -> Any:
    """What the task returns; what it raised, as it raised it."""
    try:
        return await task
    except RayTaskError as error:
        raise (error.cause or error) from None
