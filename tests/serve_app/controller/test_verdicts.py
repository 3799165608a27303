"""From numbers to measurements: what passes, what fails, and what is no data."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from typing import Any

import pytest
from scipy.stats import mannwhitneyu

from serve_app.controller import verdicts as judge
from serve_app.rollout.analysis import (
    Analysis,
    Check,
    Comparison,
    Limits,
    Measurement,
    NoData,
    Outcome,
    Probe,
    Query,
)
from serve_app.wire.request_stats import RequestStats

PASS, FAIL, INCONCLUSIVE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE
SECONDS = [number / 100 for number in range(1, 101)]  # 0.01, 0.02 ... 1.00
TIMES = [
    ("latency", "latency_s"),
    ("time_to_first_token", "first_token_s"),
    ("tokens_per_second", "tokens_per_s"),
]


def judged(
    check: Check, canary: RequestStats, stable: RequestStats | None = None, **more: Any
) -> Measurement:
    [found] = judge.checks(Analysis(checks=(check,), **more), canary, stable or RequestStats())
    return found


def stats(errors: int = 0, /, **values: list[float]) -> RequestStats:
    requests = max((len(each) for each in values.values()), default=0) + errors
    return RequestStats(requests=requests, errors=errors, chosen=requests, **values)


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "where"), TIMES)
@pytest.mark.parametrize(
    ("quantile", "figure"), [(0.5, 0.51), (0.95, 0.96), (0.99, 1.0), (0.999, 1.0), (0.001, 0.01)]
)
def test_a_metric_is_the_quantile_of_its_own_values(
    metric: Any, where: str, quantile: float, figure: float
) -> None:
    shuffled = random.Random(1).sample(SECONDS, 100)
    values = {name: [9.0] * 100 for _, name in TIMES} | {where: shuffled}
    for limit, outcome in ((figure, PASS), (figure - 0.001, FAIL)):
        check = Check(metric=metric, quantile=quantile, max=limit)
        found = judged(check, stats(**values))
        assert (found.outcome, found.canary, found.canary_samples) == (outcome, figure, 100)
        assert found.name == f"{metric} p{100 * quantile:g}"
    assert judged(Check(metric=metric, quantile=quantile, min=2), stats(**values)).outcome is FAIL


def test_without_a_quantile_it_is_the_usual_one() -> None:
    values = stats(latency_s=SECONDS, tokens_per_s=SECONDS)
    assert judged(Check(metric="latency", max=1), values).name == "latency p95"
    assert judged(Check(metric="tokens_per_second", min=0), values).name == "tokens_per_second p50"


def test_the_share_of_failed_requests_is_one_number() -> None:
    values = RequestStats(requests=200, errors=3)
    found = judged(Check(metric="error_rate", max=0.01), values)
    assert (found.name, found.outcome, found.canary) == ("error_rate", FAIL, 0.015)
    assert found.why == "error_rate is 0.015, and has to be at most 0.01"
    assert judged(Check(metric="error_rate", max=0.015), values).outcome is PASS
    assert judged(Check(metric="error_rate", max=0), RequestStats(requests=30)).outcome is PASS


def test_what_fails_says_its_figure_its_unit_and_both_limits() -> None:
    found = judged(Check(metric="latency", min=2, max=3), stats(latency_s=SECONDS))
    assert found.why == "latency p95 is 0.96 s, and has to be at least 2 and at most 3 s"
    fine = judged(Check(metric="tokens_per_second", min=0.5), stats(tokens_per_s=SECONDS))
    assert fine.why == "tokens_per_second p50 is 0.51 tokens/s"


def test_the_figure_of_stable_is_told_where_there_is_one() -> None:
    check = Check(metric="latency", max=2)
    found = judged(check, stats(latency_s=SECONDS), stats(latency_s=[5.0, 7.0]))
    assert (found.outcome, found.stable, found.stable_samples) == (PASS, 7.0, 2)
    assert judged(check, stats(latency_s=SECONDS)).stable is None


# ---- no data ------------------------------------------------------------------------------------

COMPARED = Check(metric="latency", max=2, versus_stable=Comparison())


@pytest.mark.parametrize("no_data", ["inconclusive", "pass", "fail"])
def test_too_few_requests_are_what_the_plan_says_they_are(no_data: NoData) -> None:
    more: dict[str, Any] = {"min_samples": 50, "no_data": no_data}
    few, enough = stats(latency_s=SECONDS[:49]), stats(latency_s=SECONDS[:50])
    for check in (Check(metric="latency", max=2), Check(metric="error_rate", max=1), COMPARED):
        found = judged(check, few, enough, **more)
        assert found.outcome == no_data
        assert "49 of 50 samples on the canary" in found.why
    assert judged(Check(metric="latency", max=2), enough, **more).outcome is PASS


@pytest.mark.parametrize("no_data", ["inconclusive", "pass", "fail"])
def test_too_few_requests_on_stable_are_no_data_for_a_comparison_only(no_data: NoData) -> None:
    more: dict[str, Any] = {"min_samples": 50, "no_data": no_data}
    few, enough = stats(latency_s=SECONDS[:49]), stats(latency_s=SECONDS[:50])
    found = judged(COMPARED, enough, few, **more)
    assert (found.outcome, found.canary_samples, found.stable_samples) == (no_data, 50, 49)
    assert found.why == "latency p95: 49 of 50 samples on stable"
    assert judged(Check(metric="latency", max=2), enough, few, **more).outcome is PASS


def test_a_limit_that_is_broken_needs_no_comparison_to_fail() -> None:
    check = Check(metric="latency", max=0.1, versus_stable=Comparison())
    assert judged(check, stats(latency_s=SECONDS)).outcome is FAIL


def test_many_failures_do_not_stand_in_for_times() -> None:
    found = judged(Check(metric="latency", max=2), stats(100, latency_s=SECONDS[:5]))
    assert found.why == "latency p95: 5 of 30 samples on the canary"


# ---- against stable -----------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "where"), TIMES)
def test_being_worse_than_stable_fails_and_being_better_passes(metric: Any, where: str) -> None:
    check = Check(metric=metric, versus_stable=Comparison())
    small, large = stats(**{where: SECONDS}), stats(**{where: [2 * each for each in SECONDS]})
    better, worse = (large, small) if metric == "tokens_per_second" else (small, large)
    failed, passed = judged(check, worse, better), judged(check, better, worse)
    assert (failed.outcome, passed.outcome) == (FAIL, PASS)
    assert "worse with probability 0.75" in failed.why
    assert "worse with probability 0.25" in passed.why
    assert "on the canary and" in failed.why
    assert "on stable" in failed.why
    assert (failed.canary_samples, failed.stable_samples) == (100, 100)


def test_a_significant_difference_that_does_not_matter_passes() -> None:
    """Each a little worse, and thousands of them."""
    ours = stats(latency_s=[each + 0.05 for each in SECONDS * 20])
    theirs = stats(latency_s=SECONDS * 20)
    found = judged(Check(metric="latency", versus_stable=Comparison()), ours, theirs)
    assert found.outcome is PASS
    p = float(found.why.rsplit("p = ", 1)[1])
    assert p < 0.001
    smaller = Comparison(effect=0.54)
    assert judged(Check(metric="latency", versus_stable=smaller), ours, theirs).outcome is FAIL


def test_a_large_difference_that_chance_explains_passes() -> None:
    ours, theirs = stats(latency_s=[1.0, 3.0, 4.0, 5.0]), stats(latency_s=[0.5, 1.5, 2.0, 4.5])
    one = Comparison(effect=0.6)
    found = judged(Check(metric="latency", versus_stable=one), ours, theirs, min_samples=4)
    assert found.outcome is PASS
    bold = Comparison(effect=0.6, alpha=0.4)
    found = judged(Check(metric="latency", versus_stable=bold), ours, theirs, min_samples=4)
    assert found.outcome is FAIL


@pytest.mark.parametrize(
    "same", [stats(latency_s=[1.0] * 50), RequestStats(requests=50, errors=50)]
)
def test_two_sides_that_are_all_the_same_are_no_different(same: RequestStats) -> None:
    metric: Any = "latency" if same.latency_s else "error_rate"
    found = judged(Check(metric=metric, versus_stable=Comparison()), same, same)
    assert found.outcome is PASS
    assert "probability 0.50, p = 1" in found.why


def test_a_canary_like_stable_is_hardly_ever_taken_back() -> None:
    """Many looks at skewed times, a quarter of them with a tail, as latencies have."""
    chance = random.Random(3)

    def times(count: int) -> list[float]:
        return [chance.lognormvariate(0, 1) + 9 * (chance.random() < 0.25) for _ in range(count)]

    strict = Check(metric="latency", versus_stable=Comparison(effect=0.500001))
    usual = Check(metric="latency", versus_stable=Comparison())
    failed = {"strict": 0, "usual": 0}
    for _ in range(200):
        ours, theirs = stats(latency_s=times(40)), stats(latency_s=times(200))
        failed["strict"] += judged(strict, ours, theirs).outcome is FAIL
        failed["usual"] += judged(usual, ours, theirs).outcome is FAIL
    assert failed["strict"] <= 2  # of 200 with alpha 0.001; more than 2 is once in 800 seeds
    assert failed["usual"] <= failed["strict"]


@pytest.mark.parametrize(
    "numbers", [(3, 40, 1, 100), (0, 30, 5, 30), (30, 30, 1, 200), (500, 9_000, 90, 4_000)]
)
def test_failures_are_compared_as_ones_and_zeros_would_be(
    numbers: tuple[int, int, int, int],
) -> None:
    bad, of, their_bad, of_theirs = numbers
    ours, theirs = (
        [1.0] * ones + [0.0] * (all_of_them - ones)
        for ones, all_of_them in ((bad, of), (their_bad, of_theirs))
    )
    want = mannwhitneyu(ours, theirs, alternative="greater", method="asymptotic")
    check = Check(metric="error_rate", versus_stable=Comparison())
    found = judged(
        check,
        RequestStats(requests=of, errors=bad),
        RequestStats(requests=of_theirs, errors=their_bad),
    )
    effect = float(want.statistic) / (of * of_theirs)
    assert f"probability {effect:.2f}, p = {float(want.pvalue):.2g}" in found.why


def test_failures_in_their_millions_are_compared_too() -> None:
    ours, theirs = (
        RequestStats(requests=10**7, errors=10**6),
        RequestStats(requests=10**8, errors=10**6),
    )
    for effect, outcome in ((0.54, FAIL), (0.65, PASS)):
        check = Check(metric="error_rate", versus_stable=Comparison(effect=effect))
        assert judged(check, ours, theirs).outcome is outcome
        assert judged(check, theirs, ours).outcome is PASS


# ---- probes and queries -------------------------------------------------------------------------

PROBE = Probe(function="a.b:c", scores={"gain": Limits(min=-0.05), "loss": Limits(max=1)})


def test_each_score_with_limits_has_to_be_within_them() -> None:
    gain, loss = judge.scores(PROBE, {"gain": -0.06, "loss": 1, "more": 7})
    assert (gain.outcome, gain.canary) == (FAIL, -0.06)
    assert gain.why == "a.b:c gain is -0.06, and has to be at least -0.05"
    assert (loss.outcome, loss.why) == (PASS, "a.b:c loss is 1")


def test_a_score_that_the_probe_did_not_return_fails_with_those_that_it_did() -> None:
    gain, loss = judge.scores(PROBE, {"loss": 0, "other": 1})
    assert (gain.outcome, loss.outcome) == (FAIL, PASS)
    assert gain.why == "a.b:c gain was not among its scores (loss, other)"
    assert judge.scores(PROBE, {})[0].why.endswith("(none)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_outside_and_can_still_be_written_down(value: float) -> None:
    gain, loss = judge.scores(PROBE, {"gain": value, "loss": value})
    assert FAIL in (gain.outcome, loss.outcome)
    assert gain.canary is None
    json.dumps([asdict(gain), asdict(loss)], allow_nan=False)


QUERY = Query(address="http://prometheus", query="my_ratio", max=0.2)


@pytest.mark.parametrize("no_data", ["inconclusive", "pass", "fail"])
def test_a_query_without_a_value_is_no_data(no_data: NoData) -> None:
    found = judge.query(QUERY, None, no_data=no_data)
    assert (found.outcome, found.canary) == (Outcome(no_data), None)
    assert found.why == "my_ratio: Prometheus has no value for it"


def test_a_query_with_a_value_has_to_be_within_its_limits() -> None:
    assert judge.query(QUERY, 0.2, no_data="fail").outcome is PASS
    found = judge.query(QUERY, 0.25, no_data="pass")
    assert (found.outcome, found.canary) == (FAIL, 0.25)
    assert found.why == "my_ratio is 0.25, and has to be at most 0.2"


# ---- all of it ----------------------------------------------------------------------------------


def test_what_could_not_be_looked_at_is_inconclusive_and_says_why() -> None:
    found = judge.broken("a.b:c", "is still running")
    assert (found.outcome, found.why) == (INCONCLUSIVE, "a.b:c: is still running")


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        ([], PASS),
        ([PASS, PASS], PASS),
        ([PASS, INCONCLUSIVE], INCONCLUSIVE),
        ([INCONCLUSIVE, FAIL, PASS], FAIL),
    ],
)
def test_one_failure_is_enough_and_all_have_to_pass(seen: list[Outcome], outcome: Outcome) -> None:
    each = [Measurement(name="x", outcome=one, why="so") for one in seen]
    assert judge.outcome(each) is outcome


def test_every_check_of_a_plan_is_judged_in_its_order() -> None:
    checks = (Check(metric="latency", max=2), Check(metric="error_rate", max=0), COMPARED)
    found = judge.checks(Analysis(checks=checks), stats(latency_s=SECONDS), RequestStats())
    assert [each.name for each in found] == ["latency p95", "error_rate", "latency p95"]
    assert [each.outcome for each in found] == [PASS, PASS, INCONCLUSIVE]
