"""The measurements of a canary step: pass, fail or inconclusive, with the reason.

Pure. `analysis` brings the numbers: request statistics, scores of probes, answers of Prometheus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from serve_app.rollout.analysis import (
    Analysis,
    Check,
    Limits,
    Measurement,
    NoData,
    Outcome,
    Probe,
    Query,
)
from serve_app.wire.request_stats import RequestStats

_BETTER_LARGE = frozenset({"tokens_per_second"})
_UNITS = {"latency": " s", "time_to_first_token": " s", "tokens_per_second": " tokens/s"}


class _Worse(NamedTuple):
    """Evidence that the canary is worse than stable.

    `p`: the one-sided p-value. `effect`: the probability that a request on the canary is worse than
    one on stable; ties count half.
    """

    p: float
    effect: float


def outcome(measurements: Iterable[Measurement]) -> Outcome:
    """One that fails is enough to fail; all have to pass to pass."""
    seen = {each.outcome for each in measurements}
    for worst in (Outcome.FAIL, Outcome.INCONCLUSIVE):
        if worst in seen:
            return worst
    return Outcome.PASS


def checks(analysis: Analysis, canary: RequestStats, stable: RequestStats) -> list[Measurement]:
    """Each built-in check, on what the two revisions answered in the same time."""
    return [
        _check(check, canary, stable, least=analysis.min_samples, no_data=analysis.no_data)
        for check in analysis.checks
    ]


def scores(probe: Probe, given: Mapping[str, float]) -> list[Measurement]:
    """Each score that the plan has limits for; one that the probe did not return fails."""
    found = []
    for name, limits in probe.scores.items():
        what = f"{probe.function} {name}"
        if (value := given.get(name)) is None:
            had = ", ".join(sorted(given)) or "none"
            why = f"{what} was not among its scores ({had})"
            found.append(Measurement(name=what, outcome=Outcome.FAIL, why=why))
        else:
            found.append(_limited(what, float(value), limits))
    return found


def query(asked: Query, value: float | None, *, no_data: NoData) -> Measurement:
    """The measurement of a Prometheus query. `value` None: it has no value."""
    if value is None:
        return _nothing(asked.query, "Prometheus has no value for it", no_data)
    return _limited(asked.query, value, asked)


def broken(name: str, why: str) -> Measurement:
    """The measurement failed: inconclusive, not a failure of the canary."""
    return Measurement(name=name, outcome=Outcome.INCONCLUSIVE, why=f"{name}: {why}")


def _check(
    check: Check, canary: RequestStats, stable: RequestStats, *, least: int, no_data: NoData
) -> Measurement:
    name = check.metric if check.of is None else f"{check.metric} p{100 * check.of:g}"
    ours, theirs = _size(check, canary), _size(check, stable)
    if ours < least:
        return _nothing(name, f"{ours} of {least} samples on the canary", no_data)
    figure = _figure(check, canary)
    unit = _UNITS.get(check.metric, "")
    said = Measurement(
        name=name,
        outcome=Outcome.PASS,
        why=f"{name} is {figure:.4g}{unit}",
        canary=figure,
        stable=_figure(check, stable) if theirs else None,
        canary_samples=ours,
        stable_samples=theirs,
    )
    if figure not in check:
        return _as(said, Outcome.FAIL, f"{said.why}, and has to be {check}{unit}")
    if check.versus_stable is None:
        return said
    if theirs < least:
        why = f"{theirs} of {least} samples on stable"
        return _as(said, _nothing(name, why, no_data).outcome, f"{name}: {why}")
    p, effect = _worse(check, canary, stable)
    why = (
        f"{name} is {figure:.4g}{unit} on the canary and {said.stable:.4g}{unit} on stable: "
        f"worse with probability {effect:.2f}, p = {p:.2g}"
    )
    limits = check.versus_stable
    fails = p < limits.alpha and effect >= limits.effect
    return _as(said, Outcome.FAIL if fails else Outcome.PASS, why)


def _size(check: Check, stats: RequestStats) -> int:
    return stats.requests if check.metric == "error_rate" else len(_values(check, stats))


def _values(check: Check, stats: RequestStats) -> list[float]:
    match check.metric:
        case "latency":
            return stats.latency_s
        case "time_to_first_token":
            return stats.first_token_s
        case "tokens_per_second":
            return stats.tokens_per_s
    raise AssertionError("errors are counted")


def _figure(check: Check, stats: RequestStats) -> float:
    if check.of is None:
        return stats.errors / stats.requests
    ranked = sorted(_values(check, stats))
    return ranked[min(int(check.of * len(ranked)), len(ranked) - 1)]


def _worse(check: Check, canary: RequestStats, stable: RequestStats) -> _Worse:
    if check.metric == "error_rate":
        return _worse_share(canary.errors, canary.requests, stable.errors, stable.requests)
    from scipy.stats import mannwhitneyu  # takes a second to import

    ours, theirs = _values(check, canary), _values(check, stable)
    larger_is_better = check.metric in _BETTER_LARGE
    found = mannwhitneyu(ours, theirs, alternative="less" if larger_is_better else "greater")
    above = float(found.statistic) / (len(ours) * len(theirs))
    return _Worse(float(found.pvalue), 1 - above if larger_is_better else above)


def _worse_share(bad: int, of: int, their_bad: int, of_theirs: int) -> _Worse:
    """The same test for error rates, from the four counts of the 2x2 table.

    By hand: `scipy.stats.mannwhitneyu` takes every single value, of which there may be millions,
    and its tests of a 2x2 table (`fisher_exact`, `barnard_exact`) give other p-values. The result
    is that of `mannwhitneyu(..., method="asymptotic")`: normal approximation, corrected for ties
    and continuity.
    """
    total = of + of_theirs
    good = total - bad - their_bad
    ties = ((total - good) ** 3 + good**3 - total) / (total * (total - 1))
    spread = math.sqrt(of * of_theirs / 12 * (total + 1 - ties))
    above = 0.5 + (bad / of - their_bad / of_theirs) / 2
    if not spread:  # all of them are the same
        return _Worse(1.0, above)
    z = (of * of_theirs * (above - 0.5) - 0.5) / spread
    return _Worse(math.erfc(z / math.sqrt(2)) / 2, above)


def _limited(name: str, value: float, limits: Limits) -> Measurement:
    good = value in limits
    return Measurement(
        name=name,
        outcome=Outcome.PASS if good else Outcome.FAIL,
        why=f"{name} is {value:.4g}" + ("" if good else f", and has to be {limits}"),
        canary=value if math.isfinite(value) else None,  # JSON has only numbers
    )


def _nothing(name: str, why: str, no_data: NoData) -> Measurement:
    return Measurement(name=name, outcome=Outcome(no_data), why=f"{name}: {why}")


def _as(said: Measurement, outcome: Outcome, why: str) -> Measurement:
    return Measurement(
        name=said.name,
        outcome=outcome,
        why=why,
        canary=said.canary,
        stable=said.stable,
        canary_samples=said.canary_samples,
        stable_samples=said.stable_samples,
    )
