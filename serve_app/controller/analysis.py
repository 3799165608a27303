"""Runs the analysis of a canary step and sends the verdict to the rollout machine.

The numbers come from the replicas' request statistics (`canary_stats`), from probes (`probing`) and
from Prometheus. `verdicts` decides what they mean, the machine what follows from that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from hotswap_lib import Revision
from serve_app.controller import verdicts
from serve_app.controller.canary_stats import CanaryStats
from serve_app.controller.probing import Probing
from serve_app.rollout.analysis import Analysis, Measurement, Outcome, Probe, Query, Verdict
from serve_app.rollout.events import Judged
from serve_app.rollout.state import Fleet, Rollout, State

logger = logging.getLogger(__name__)
_REFRESH_S = 1.0
_QUERY_S = 5.0
# any server may be at the address, and give any answer
_NO_ANSWER = (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, IndexError)


class CanaryAnalysis:
    """Analyses the current step each `interval`. For one event loop.

    Args:
        fleet: the machine's state now.
        refresh: waits for a new report of every replica, for some seconds at most.
        decide: takes an event to the machine.

    Attributes:
        stats: the request statistics of the current step.
        latest: the latest verdict on the current step, also if nothing followed from it.
    """

    def __init__(
        self,
        stats: CanaryStats,
        *,
        fleet: Callable[[], Fleet],
        refresh: Callable[[float], Awaitable[None]],
        decide: Callable[[Judged], Awaitable[None]],
        probing: Probing,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.stats = stats
        self.latest: Verdict | None = None
        self._fleet = fleet
        self._refresh = refresh
        self._decide = decide
        self._probing = probing
        self._transport = transport
        self._judged_at = 0.0
        self._judging: asyncio.Task[None] | None = None
        self._probes: dict[int, asyncio.Task[list[Measurement]]] = {}

    def tick(self, *, at: float) -> None:
        """Starts an analysis if one is due. Does not wait for it."""
        rollout = self._fleet().running
        self._open_step(rollout)
        if rollout is None or (analysis := rollout.plan.analysis) is None:
            return
        if rollout.state not in (State.PROGRESSING, State.PAUSED) or rollout.placed_at is None:
            return
        until = rollout.hold_until
        # at the end of the hold, even if the interval is longer
        over = until is not None and self._judged_at < until <= at
        due = at - self._judged_at >= analysis.interval or over
        if due and (self._judging is None or self._judging.done()):
            self._judged_at = at
            self._judging = asyncio.create_task(self._judge(rollout, analysis, at=at))

    async def close(self) -> None:
        tasks = [task for task in (self._judging, *self._probes.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def verdict(self, rollout: Rollout, measurements: Sequence[Measurement], at: float) -> Verdict:
        """The verdict, with the share of the requests that the canary really got."""
        share, requests = self.stats.share_of(rollout.target)
        step = rollout.current
        return Verdict(
            step=rollout.step,
            weight=100.0 if step is None else step.weight,
            outcome=verdicts.outcome(measurements),
            at=at,
            measurements=tuple(measurements),
            share=None if share is None else round(share, 2),
            requests=requests,
        )

    def _open_step(self, rollout: Rollout | None) -> None:
        step_id = rollout.step_id if rollout is not None and rollout.begun else None
        if step_id == self.stats.step_id:
            return
        self.stats.open(step_id)
        self.latest = None
        self._judged_at = 0.0
        for task in self._probes.values():
            task.cancel()
        self._probes = {}

    async def _judge(self, rollout: Rollout, analysis: Analysis, *, at: float) -> None:
        try:
            await self._refresh(_REFRESH_S)
            canary, stable = (self.stats.of(key) for key in (rollout.target, rollout.previous))
            found = await asyncio.to_thread(verdicts.checks, analysis, canary, stable)
            if rollout.step_id != self.stats.step_id:
                return  # the step was left, and the probes belong to the next one
            found += self._probed(rollout, analysis)
            if analysis.queries:
                found = [*found, *await self._queried(rollout, analysis)]
        except Exception as error:  # no error may count as a verdict
            logger.exception("the analysis failed")
            found = [verdicts.broken("analysis", str(error) or type(error).__name__)]
        if rollout.step_id == self.stats.step_id:
            self.latest = self.verdict(rollout, found, at)
            try:
                await self._decide(Judged(step_id=rollout.step_id, verdict=self.latest, at=at))
            except Exception:  # there is another analysis after the interval
                logger.exception("the verdict could not be decided on")

    # ---- probes -------------------------------------------------------------------------------

    def _probed(self, rollout: Rollout, analysis: Analysis) -> list[Measurement]:
        """The scores of each probe. It runs once in a step, and again only if it failed."""
        found: list[Measurement] = []
        for index, probe in enumerate(analysis.probes):
            task = self._probes.get(index)
            if task is None:
                task = asyncio.create_task(self._probe(rollout, probe))
                self._probes[index] = task
            if not task.done():
                found.append(verdicts.broken(probe.function, "is still running"))
                continue
            result = task.result()
            found += result
            if verdicts.outcome(result) is Outcome.INCONCLUSIVE:
                del self._probes[index]
        return found

    async def _probe(self, rollout: Rollout, probe: Probe) -> list[Measurement]:
        limit = asyncio.timeout(probe.timeout)
        try:
            async with limit:
                scores = await self._probing.run(
                    probe.function, rollout.target, rollout.previous, probe.options
                )
            return verdicts.scores(probe, scores)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if limit.expired():
                why = f"did not end within {probe.timeout:g} s"
            return [verdicts.broken(probe.function, why)]

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
            return verdicts.broken(asked.query, f"{type(error).__name__}: {error}")
        return verdicts.query(asked, value, no_data=analysis.no_data)


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
