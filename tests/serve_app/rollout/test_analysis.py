"""What a canary is judged by: what a user may ask for, and what a verdict says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.rollout.analysis import (
    Analysis,
    Check,
    Comparison,
    Limits,
    Measurement,
    Outcome,
    Verdict,
)

CHECK = {"metric": "error_rate", "max": 0.01}
PROBE = {"function": "serve_app.probes:agreement", "scores": {"share": {"min": 0.9}}}
QUERY = {"address": "http://prometheus:9090", "query": "up", "max": 1}


def test_an_analysis_may_have_checks_probes_and_queries() -> None:
    analysis = Analysis.model_validate({"checks": [CHECK], "probes": [PROBE], "queries": [QUERY]})
    assert (analysis.interval, analysis.min_samples, analysis.no_data) == (1.0, 30, "inconclusive")
    assert (analysis.probes[0].timeout, analysis.probes[0].options) == (60.0, {})
    assert analysis.checks[0].versus_stable is None


@pytest.mark.parametrize(
    ("analysis", "why"),
    [
        ({}, "an analysis needs at least one check, probe or query"),
        ({"checks": [{"metric": "latency"}]}, "latency needs a min, a max or versus_stable"),
        ({"checks": [{**CHECK, "metric": "cost"}]}, "Input should be 'error_rate', 'latency'"),
        ({"checks": [{**CHECK, "quantile": 0.5}]}, "error_rate is one number and has no quantile"),
        ({"checks": [{**CHECK, "metric": "latency", "quantile": 1}]}, "less than 1"),
        ({"checks": [{**CHECK, "maximum": 1}]}, "Extra inputs are not permitted"),
        ({"checks": [{**CHECK, "versus_stable": {"alpha": 0}}]}, "greater than 0"),
        ({"checks": [{**CHECK, "versus_stable": {"effect": 0.5}}]}, "greater than 0.5"),
        ({"probes": [{**PROBE, "scores": {}}]}, "at least 1 item"),
        ({"probes": [{**PROBE, "scores": {"gain": {}}}]}, "the score 'gain' needs a min or a max"),
        ({"probes": [{**PROBE, "timeout": "soon"}]}, "'soon' is not a duration"),
        ({"probes": [{**PROBE, "timeout": 0}]}, "greater than 0"),
        ({"queries": [{**QUERY, "max": None}]}, "a query needs a min or a max"),
        ({"queries": [{**QUERY, "query": "  "}]}, "at least 1 character"),
        ({"queries": [{**QUERY, "address": "prometheus:9090"}]}, "should match pattern"),
        ({"checks": [CHECK], "interval": "10ms"}, "greater than or equal to 0.05"),
        ({"checks": [CHECK], "interval": "2h"}, "less than or equal to 3600"),
        ({"checks": [CHECK], "min_samples": 0}, "greater than or equal to 1"),
        ({"checks": [CHECK], "no_data": "panic"}, "Input should be 'inconclusive', 'pass' or"),
    ],
)
def test_an_analysis_that_cannot_judge_is_refused_with_the_reason(
    analysis: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValidationError, match=why):
        Analysis.model_validate(analysis)


@pytest.mark.parametrize(
    "path", ["probes", "probes:", ":probe", "a.b.c", "a..b:c", "a:b:c", "a.b:c()", "1a:b", "a b:c"]
)
def test_a_probe_is_named_by_its_package_module_and_function(path: str) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        Analysis.model_validate({"probes": [{**PROBE, "function": path}]})


@pytest.mark.parametrize(
    ("limits", "value", "within"),
    [
        (Limits(), 1e9, True),
        (Limits(max=2), 2.0, True),
        (Limits(max=2), 2.1, False),
        (Limits(min=-0.05), -0.05, True),
        (Limits(min=-0.05), -0.06, False),
        (Limits(min=1, max=2), 1.5, True),
        (Limits(min=1, max=2), float("nan"), False),
    ],
)
def test_both_ends_of_the_limits_are_still_good(limits: Limits, value: float, within: bool) -> None:
    assert (value in limits) is within


def test_limits_read_as_a_sentence() -> None:
    assert str(Limits(min=0.5, max=2)) == "at least 0.5 and at most 2"
    assert str(Limits(max=0.01)) == "at most 0.01"


@pytest.mark.parametrize(
    ("check", "quantile"),
    [
        (Check(metric="error_rate", max=0.01), None),
        (Check(metric="latency", max=2), 0.95),
        (Check(metric="time_to_first_token", max=2, quantile=0.5), 0.5),
        (Check(metric="tokens_per_second", versus_stable=Comparison()), 0.5),
    ],
)
def test_a_check_is_of_the_usual_quantile_unless_it_names_one(
    check: Check, quantile: float | None
) -> None:
    assert check.of == quantile


def test_a_verdict_is_explained_by_the_measurements_that_made_it() -> None:
    seen = [
        Measurement(name="latency", outcome=Outcome.FAIL, why="latency 3 s is not at most 2"),
        Measurement(name="error_rate", outcome=Outcome.PASS, why="error rate 0 is at most 0.01"),
        Measurement(name="gain", outcome=Outcome.FAIL, why="gain -1 is not at least 0"),
    ]
    verdict = Verdict(step=0, weight=5, outcome=Outcome.FAIL, at=1, measurements=tuple(seen))
    assert verdict.why == "latency 3 s is not at most 2; gain -1 is not at least 0"
