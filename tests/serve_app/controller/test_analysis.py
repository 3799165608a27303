"""When a canary step is analysed, and what follows: on a clock that a test turns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import httpx
import pytest

from hotswap_lib import Revision
from serve_app.controller.analysis import CanaryAnalysis
from serve_app.controller.canary_stats import CanaryStats
from serve_app.rollout.analysis import Analysis, Check, Limits, Outcome, Probe, Query
from serve_app.rollout.events import Judged
from serve_app.rollout.plan import CanaryStep, Plan
from serve_app.rollout.state import Fleet, Pause, Rollout, State
from serve_app.wire.request_stats import RequestStats
from tests.serve_app.controller.test_canary_stats import report
from tests.serve_app.fakes import settled, until

STABLE, TARGET = (
    Revision(name, digest * 8).key for name, digest in (("alpha", "1234abcd"), ("beta", "5678abcd"))
)
CHECK = Check(metric="error_rate", max=0.1)
PROBE = Probe(function="a.b:c", scores={"gain": Limits(min=0)}, options={"file": "f"}, timeout=60)
QUERY = Query(address="http://prometheus:9090", query='ratio{r="{canary}",s="{stable}"}', max=0.5)


class Bench:
    """An analysis with stand-ins for everything around it.

    `answer`: called for each probe. `refresh`: called while replicas report. `decide`: called
    before an event is added to `events`.
    """

    def __init__(
        self,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        hold: float | Literal["manual"] = 60.0,
        **analysis: Any,
    ) -> None:
        given = {"interval": 1.0, "min_samples": 1} | analysis
        steps = (CanaryStep(weight=10, hold=hold), CanaryStep(weight=50, hold=hold))
        plan = Plan(
            adapter="x", strategy="canary", steps=steps, analysis=Analysis.model_validate(given)
        )
        self.rollout = Rollout(
            id="r1",
            plan=plan,
            target=TARGET,
            previous=STABLE,
            state=State.PROGRESSING,
            begun=True,
            placed_at=100.0,
        )
        self.canary_stats = CanaryStats()
        self.events: list[Judged] = []
        self.probed: list[tuple[str, str, str, dict[str, Any]]] = []
        self.refreshed = 0
        self.answer: Callable[[], Awaitable[dict[str, float]]] = good
        self.refresh: Callable[[], Awaitable[None]] = nothing
        self.decide: Callable[[], Awaitable[None]] = nothing
        self.analysis = CanaryAnalysis(
            self.canary_stats,
            fleet=lambda: Fleet(stable=STABLE, rollout=self.rollout),
            refresh=self._refresh,
            decide=self._decide,
            probing=self,
            transport=transport,
        )

    async def check(self, functions: Sequence[str]) -> None:
        raise NotImplementedError

    async def run(
        self, function: str, canary: str, stable: str, options: Mapping[str, Any]
    ) -> dict[str, float]:
        self.probed.append((function, canary, stable, dict(options)))
        return await self.answer()

    async def _refresh(self, timeout_s: float) -> None:  # noqa: ARG002
        self.refreshed += 1
        await self.refresh()

    async def _decide(self, event: Judged) -> None:
        await self.decide()
        self.events.append(event)

    def stats(
        self, revision: str = TARGET, *, requests: int, errors: int = 0, chosen: int = 0
    ) -> None:
        counted = RequestStats(requests=requests, errors=errors, chosen=chosen)
        self.canary_stats.add(report(revision, self.rollout.step_id, **{revision: counted}))

    async def look(self, at: float) -> Judged:
        """The verdict of an analysis at this time."""
        seen = len(self.events)
        self.analysis.tick(at=at)
        await until(lambda: len(self.events) > seen)
        await settled()
        return self.events[-1]

    def __call__(self, story: Coroutine[Any, Any, None]) -> None:
        async def told() -> None:
            try:
                await story
            finally:
                await self.analysis.close()
                await settled()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(told())


async def good() -> dict[str, float]:
    return {"gain": 1.0}


async def bad() -> dict[str, float]:
    return {"gain": -1.0}


async def raises() -> dict[str, float]:
    raise ArithmeticError("no numbers today")


async def for_ever() -> Any:
    await asyncio.Event().wait()


async def nothing() -> None:
    pass


# ---- when ---------------------------------------------------------------------------------------


async def until_idle() -> None:
    """Returns once no analysis and no probe runs."""
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()}, "a task never ended")


async def looks(bench: Bench, times: Sequence[float]) -> list[float]:
    """Those of the ticks at which it looks."""
    found = []
    for at in times:
        before = bench.refreshed
        bench.analysis.tick(at=at)
        await until_idle()
        if bench.refreshed > before:
            found.append(at)
    return found


def test_it_looks_at_once_and_then_each_interval() -> None:
    bench = Bench(checks=[CHECK], interval=2.0)

    async def story() -> None:
        times = [100.0, 100.5, 101.9, 102.0, 103.0, 104.1, 105.9, 106.2]
        assert await looks(bench, times) == [100.0, 102.0, 104.1, 106.2]
        assert [event.at for event in bench.events] == [100.0, 102.0, 104.1, 106.2]

    bench(story())


def test_it_looks_at_the_end_of_the_hold_whatever_the_interval() -> None:
    bench = Bench(checks=[CHECK], interval=50.0, hold=60.0)

    async def story() -> None:
        times = [100.0, 149.0, 150.0, 159.9, 160.0, 160.5, 170.0, 210.0]
        assert await looks(bench, times) == [100.0, 150.0, 160.0, 210.0]

    bench(story())


def test_a_step_that_is_held_by_hand_is_looked_at_too() -> None:
    bench = Bench(checks=[CHECK], hold="manual")
    bench.rollout = replace(bench.rollout, state=State.PAUSED, pause=Pause.STEP)

    async def story() -> None:
        assert await looks(bench, [100.0, 100.5, 101.0]) == [100.0, 101.0]

    bench(story())


@pytest.mark.parametrize(
    "change",
    [
        {"placed_at": None},
        {"state": State.STAGING, "begun": False},
        {"state": State.PROMOTING},
        {"state": State.ABORTING},
        {"state": State.ABORTED},
    ],
)
def test_nothing_is_looked_at_unless_a_step_is_held(change: dict[str, Any]) -> None:
    bench = Bench(checks=[CHECK], probes=[PROBE])
    bench.rollout = replace(bench.rollout, **change)

    async def story() -> None:
        assert await looks(bench, [100.0, 200.0, 300.0]) == []
        assert bench.probed == []

    bench(story())


def test_a_plan_without_an_analysis_counts_and_judges_nothing() -> None:
    bench = Bench(checks=[CHECK])
    bench.rollout = replace(
        bench.rollout, plan=bench.rollout.plan.model_copy(update={"analysis": None})
    )

    async def story() -> None:
        assert await looks(bench, [100.0, 200.0]) == []
        assert bench.canary_stats.step_id == bench.rollout.step_id, (
            "its share is shown all the same"
        )

    bench(story())


def test_it_never_looks_twice_at_once() -> None:
    bench = Bench(checks=[CHECK])

    async def story() -> None:
        go = asyncio.Event()

        async def wait() -> None:
            await go.wait()

        bench.refresh = wait
        for at in (100.0, 200.0, 300.0):
            bench.analysis.tick(at=at)
            await settled()
        assert bench.refreshed == 1
        go.set()
        await until(lambda: len(bench.events) == 1)
        assert (await bench.look(301.0)).at == 301.0

    bench(story())


# ---- what ---------------------------------------------------------------------------------------


def test_a_verdict_has_what_was_counted_and_the_share_that_the_canary_got() -> None:
    bench = Bench(checks=[CHECK])

    async def story() -> None:
        async def reported() -> None:
            bench.stats(requests=30, errors=1, chosen=10)
            bench.stats(STABLE, requests=90, chosen=70)

        bench.refresh = reported
        event = await bench.look(100.0)
        verdict = event.verdict
        assert (event.step_id, verdict.outcome, verdict.at) == ("r1.1.1", Outcome.PASS, 100.0)
        assert (verdict.step, verdict.weight, verdict.share) == (0, 10.0, 12.5)
        assert verdict.requests == 80
        assert [each.name for each in verdict.measurements] == ["error_rate"]
        assert bench.analysis.latest == verdict

    bench(story())


def test_one_thing_that_fails_fails_the_step() -> None:
    bench = Bench(checks=[CHECK], probes=[PROBE])

    async def story() -> None:
        bench.analysis.tick(at=0)
        bench.answer = for_ever
        bench.stats(requests=30, errors=30)
        verdict = (await bench.look(100.0)).verdict
        assert verdict.outcome is Outcome.FAIL
        assert verdict.why == "error_rate is 1, and has to be at most 0.1"

    bench(story())


def test_an_analysis_that_breaks_is_no_verdict_and_is_done_again() -> None:
    bench = Bench(checks=[CHECK])

    async def broken() -> None:
        raise OSError("the wire is cut")

    async def story() -> None:
        bench.refresh = broken
        verdict = (await bench.look(100.0)).verdict
        assert (verdict.outcome, verdict.why) == (
            Outcome.INCONCLUSIVE,
            "analysis: the wire is cut",
        )
        bench.refresh = nothing
        bench.stats(requests=5)
        assert (await bench.look(101.0)).verdict.outcome is Outcome.PASS

    bench(story())


def test_a_machine_that_does_not_take_a_verdict_is_told_the_next() -> None:
    bench = Bench(checks=[CHECK])

    async def refused() -> None:
        raise OSError("no journal")

    async def story() -> None:
        bench.decide = refused
        assert await looks(bench, [100.0]) == [100.0]
        assert bench.events == []
        bench.decide = nothing
        assert (await bench.look(101.0)).at == 101.0

    bench(story())


# ---- another step -------------------------------------------------------------------------------


def next_step(bench: Bench, **more: Any) -> None:
    bench.rollout = replace(bench.rollout, **({"step": 1, "placed_at": 200.0} | more))


@pytest.mark.parametrize("more", [{}, {"step": 0, "attempt": 2}, {"state": State.ABORTED}])
def test_the_verdict_on_a_step_that_ended_meanwhile_is_dropped(more: dict[str, Any]) -> None:
    bench = Bench(checks=[CHECK], probes=[PROBE])

    async def story() -> None:
        async def meanwhile() -> None:
            next_step(bench, **more)
            bench.analysis.tick(at=100.1)

        bench.refresh = meanwhile
        bench.analysis.tick(at=100.0)
        await until_idle()
        assert bench.events == []
        assert bench.probed == [], "a probe of the old step would stand for the new one"
        assert bench.analysis.latest is None

    bench(story())


def test_a_step_that_ends_while_prometheus_is_asked_has_no_verdict() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        next_step(bench)
        bench.analysis.tick(at=100.1)
        return scalar("0.1")

    bench = Bench(queries=[QUERY], transport=httpx.MockTransport(answer))

    async def story() -> None:
        bench.analysis.tick(at=100.0)
        await until_idle()
        assert bench.events == []

    bench(story())


def test_each_step_is_counted_probed_and_looked_at_from_its_beginning() -> None:
    bench = Bench(checks=[CHECK], probes=[PROBE], interval=1000.0)

    async def story() -> None:
        bench.analysis.tick(at=0)
        bench.stats(requests=10, errors=10, chosen=10)
        assert (await bench.look(1100.0)).verdict.requests == 10
        next_step(bench, placed_at=1100.1)
        event = await bench.look(1100.2)
        assert (event.step_id, event.verdict.step, event.verdict.requests) == ("r1.2.1", 1, 0)
        assert len(bench.probed) == 2

    bench(story())


# ---- probes -------------------------------------------------------------------------------------


def test_a_probe_runs_once_in_a_step_and_its_scores_stay() -> None:
    bench = Bench(probes=[PROBE])

    async def story() -> None:
        assert (await bench.look(100.0)).verdict.outcome is Outcome.INCONCLUSIVE
        for at in (101.0, 102.0, 103.0):
            assert (await bench.look(at)).verdict.outcome is Outcome.PASS
        assert bench.probed == [("a.b:c", TARGET, STABLE, {"file": "f"})]

    bench(story())


def test_a_probe_whose_scores_fail_is_not_asked_again() -> None:
    bench = Bench(probes=[PROBE])
    bench.answer = bad

    async def story() -> None:
        await bench.look(100.0)
        for at in (101.0, 102.0):
            verdict = (await bench.look(at)).verdict
            assert verdict.outcome is Outcome.FAIL
            assert verdict.why == "a.b:c gain is -1, and has to be at least 0"
        assert len(bench.probed) == 1

    bench(story())


def test_a_probe_that_raises_is_inconclusive_and_runs_again() -> None:
    bench = Bench(probes=[PROBE])
    bench.answer = raises

    async def story() -> None:
        await bench.look(100.0)
        verdict = (await bench.look(101.0)).verdict
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert verdict.why == "a.b:c: ArithmeticError: no numbers today"
        assert len(bench.probed) == 1
        bench.answer = good
        assert "still running" in (await bench.look(102.0)).verdict.why
        assert (await bench.look(103.0)).verdict.outcome is Outcome.PASS
        assert len(bench.probed) == 2

    bench(story())


def test_a_probe_that_takes_too_long_is_stopped_and_runs_again() -> None:
    bench = Bench(probes=[PROBE.model_copy(update={"timeout": 0.01})])
    stopped = 0

    async def endless() -> dict[str, float]:
        nonlocal stopped
        try:
            await for_ever()
        finally:
            stopped += 1
        raise AssertionError

    bench.answer = endless

    async def story() -> None:
        assert "still running" in (await bench.look(100.0)).verdict.why
        await until(lambda: stopped == 1)
        await settled()
        verdict = (await bench.look(101.0)).verdict
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert verdict.why == "a.b:c: did not end within 0.01 s"
        bench.answer = good
        await bench.look(102.0)
        assert (await bench.look(103.0)).verdict.outcome is Outcome.PASS

    bench(story())


def test_a_probe_that_meets_a_timeout_of_its_own_says_so() -> None:
    bench = Bench(probes=[PROBE])

    async def impatient() -> dict[str, float]:
        raise TimeoutError("no answer")

    bench.answer = impatient

    async def story() -> None:
        await bench.look(100.0)
        assert (await bench.look(101.0)).verdict.why == "a.b:c: TimeoutError: no answer"

    bench(story())


def test_a_probe_that_runs_holds_up_nothing_else() -> None:
    bench = Bench(checks=[CHECK], probes=[PROBE, PROBE.model_copy(update={"function": "d.e:f"})])

    async def story() -> None:
        answers = iter([for_ever, good])
        bench.answer = lambda: next(answers)()
        bench.analysis.tick(at=0)
        bench.stats(requests=5)
        await bench.look(100.0)
        found = (await bench.look(101.0)).verdict.measurements
        assert [each.outcome for each in found] == ["pass", "inconclusive", "pass"]
        assert len(bench.probed) == 2

    bench(story())


def test_the_probe_of_a_step_that_ended_is_stopped() -> None:
    bench = Bench(probes=[PROBE])
    bench.answer = for_ever

    async def story() -> None:
        await bench.look(100.0)
        [probe] = asyncio.all_tasks() - {asyncio.current_task()}
        next_step(bench, state=State.ABORTED)
        bench.analysis.tick(at=101.0)
        await settled()
        assert probe.cancelled()

    bench(story())


def test_closing_stops_a_look_and_every_probe() -> None:
    bench = Bench(probes=[PROBE])
    bench.answer = for_ever

    async def story() -> None:
        await bench.look(100.0)
        bench.refresh = for_ever
        bench.analysis.tick(at=200.0)
        await settled()
        assert len(asyncio.all_tasks()) == 3
        await bench.analysis.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await bench.analysis.close()  # again, or with nothing to stop

    bench(story())


# ---- Prometheus ---------------------------------------------------------------------------------


def data(kind: str, result: Any) -> httpx.Response:
    document = {"status": "success", "data": {"resultType": kind, "result": result}}
    return httpx.Response(200, json=document)


def scalar(value: str) -> httpx.Response:
    return data("scalar", [1.0, value])


def vector(*values: str) -> httpx.Response:
    return data("vector", [{"metric": {}, "value": [1.0, value]} for value in values])


def queried(answer: Callable[[httpx.Request], httpx.Response], **more: Any) -> Any:
    """The measurement that comes of one query."""
    bench = Bench(transport=httpx.MockTransport(answer), **({"queries": [QUERY]} | more))
    found = []

    async def story() -> None:
        found.append((await bench.look(100.0)).verdict.measurements[0])

    bench(story())
    return found[0]


@pytest.mark.parametrize(
    ("response", "value", "outcome"),
    [
        (scalar("0.25"), 0.25, "pass"),
        (scalar("0.75"), 0.75, "fail"),
        (vector("0.25"), 0.25, "pass"),
        (vector("0.5000001"), 0.5000001, "fail"),
        (scalar("+Inf"), None, "fail"),
        (scalar("-Inf"), None, "pass"),
    ],
)
def test_the_one_number_of_a_query_has_to_be_within_its_limits(
    response: httpx.Response, value: float | None, outcome: str
) -> None:
    found = queried(lambda _: response)
    assert (found.canary, found.outcome) == (value, outcome)


def test_a_query_names_the_two_revisions_as_metrics_do() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return scalar("0")

    queried(answer)
    [request] = asked
    assert str(request.url).startswith("http://prometheus:9090/api/v1/query?query=")
    assert request.url.params["query"] == 'ratio{r="beta@5678abcd",s="alpha@1234abcd"}'


@pytest.mark.parametrize("no_data", ["inconclusive", "pass", "fail"])
@pytest.mark.parametrize("response", [vector(), vector("NaN"), scalar("NaN")])
def test_an_empty_answer_or_a_rate_over_nothing_is_no_data(
    response: httpx.Response, no_data: str
) -> None:
    found = queried(lambda _: response, no_data=no_data)
    assert (found.outcome, found.canary) == (no_data, None)


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (vector("1", "2"), "the query gives 2 values, and one is wanted"),
        (httpx.Response(503, text="later"), "503"),
        (httpx.Response(400, json={"status": "error", "error": "parse error"}), "400"),
        (httpx.Response(200, text="<html>a proxy</html>"), "JSON"),
        (httpx.Response(200, content=b"\xff\xfe"), ""),
        (httpx.Response(200, json=[]), ""),
        (httpx.Response(200, json={"data": None}), ""),
        (httpx.Response(200, json={"status": "error"}), "data"),
        (data("string", [1.0, "many"]), "many"),
        (data("matrix", [{"metric": {}, "values": []}]), ""),
        (data("scalar", None), ""),
        (data("vector", [{}]), "value"),
        (data("vector", [7]), ""),
    ],
)
@pytest.mark.parametrize("no_data", ["pass", "fail"])
def test_an_answer_that_is_not_one_number_is_inconclusive_whatever_no_data_is(
    response: httpx.Response, why: str, no_data: str
) -> None:
    found = queried(lambda _: response, no_data=no_data)
    assert found.outcome == "inconclusive"
    assert found.name == QUERY.query
    assert why in found.why


def test_a_prometheus_that_cannot_be_reached_is_inconclusive_and_the_rest_is_judged() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if "ratio" in str(request.url):
            raise httpx.ConnectError("connection refused")
        return scalar("0.1")

    nowhere = Query(address="http://x:port", query="x", max=1)
    queries = [QUERY, nowhere, QUERY.model_copy(update={"query": "other"})]
    bench = Bench(
        checks=[CHECK], queries=queries, transport=httpx.MockTransport(answer), no_data="pass"
    )

    async def story() -> None:
        found = (await bench.look(100.0)).verdict.measurements
        outcomes = [each.outcome for each in found]
        assert outcomes == ["pass", "inconclusive", "inconclusive", "pass"]
        assert "connection refused" in found[1].why

    bench(story())


def test_what_it_saw_can_be_written_down() -> None:
    found = queried(lambda _: scalar("+Inf"))
    json.dumps(asdict(found), allow_nan=False)
