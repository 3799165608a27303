"""Request statistics of a canary step on one replica."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from serve_app.engine import request_recorder as recorder
from serve_app.engine.request_recorder import RequestRecorder
from serve_app.rollout.analysis import Analysis, Check
from serve_app.wire.request_stats import SAMPLES, RequestStats

STEP = "r1.1.1"


def opened(chance: random.Random | None = None) -> RequestRecorder:
    own = RequestRecorder(chance)
    own.start_step(STEP)
    return own


def record(own: RequestRecorder, revision: str = "beta@1", **more: Any) -> None:
    given = {"step_id": STEP, "chosen": True, "failed": False, "latency_s": 1.0}
    own.record(revision, **{**given, **more})


def test_a_request_adds_to_the_statistics_of_its_revision_alone() -> None:
    own = opened()
    record(own, latency_s=2.5, first_token_s=0.5, tokens=5)
    record(own, "alpha@1", chosen=False, latency_s=1.5)
    assert own.request_stats == {
        "beta@1": RequestStats(
            requests=1, chosen=1, latency_s=[2.5], first_token_s=[0.5], tokens_per_s=[2.0]
        ),
        "alpha@1": RequestStats(requests=1, latency_s=[1.5]),
    }


def test_the_times_of_a_failed_request_are_not_sampled() -> None:
    own = opened()
    record(own, failed=True, latency_s=30.0, first_token_s=0.5, tokens=9)
    assert own.request_stats == {"beta@1": RequestStats(requests=1, errors=1, chosen=1)}


@pytest.mark.parametrize("more", [{"tokens": 1}, {"tokens": 0}, {"tokens": 5, "latency_s": 0.5}])
def test_an_answer_without_two_tokens_or_time_between_them_has_no_rate(
    more: dict[str, Any],
) -> None:
    own = opened()
    record(own, first_token_s=0.5, **more)
    [stats] = own.request_stats.values()
    assert (len(stats.latency_s), stats.first_token_s, stats.tokens_per_s) == (1, [0.5], [])


def test_nothing_is_counted_while_there_is_no_canary_step() -> None:
    own = RequestRecorder()
    record(own, step_id=None)
    record(own)
    assert own.request_stats == {}


def test_a_new_canary_step_starts_with_nothing_and_the_same_one_goes_on() -> None:
    own = opened()
    record(own)
    own.start_step(STEP)
    assert own.request_stats["beta@1"].requests == 1
    own.start_step("r1.2.1")
    assert (own.step_id, own.request_stats) == ("r1.2.1", {})
    own.start_step(None)
    assert (own.step_id, own.request_stats) == (None, {})


def test_a_request_that_arrived_in_another_canary_step_does_not_count() -> None:
    own = opened()
    own.start_step("r1.2.1")
    record(own)
    record(own, step_id=None)
    assert own.request_stats == {}
    record(own, step_id="r1.2.1")
    assert own.request_stats["beta@1"].requests == 1


def test_the_numbers_of_an_earlier_canary_step_stay_as_they_were_reported() -> None:
    own = opened()
    record(own)
    reported = own.request_stats
    own.start_step("r1.2.1")
    record(own, step_id="r1.2.1")
    assert reported == {"beta@1": RequestStats(requests=1, chosen=1, latency_s=[1.0])}


def test_statistics_cross_process_boundaries() -> None:
    own = opened()
    record(own, first_token_s=0.5, tokens=3)
    assert pickle.loads(pickle.dumps(own.request_stats)) == own.request_stats


# ---- samples ------------------------------------------------------------------------------------


def test_samples_are_bounded_and_numbers_are_not() -> None:
    own = opened()
    for _ in range(3 * SAMPLES):
        record(own, first_token_s=0.5, tokens=2)
    [stats] = own.request_stats.values()
    assert (stats.requests, stats.chosen) == (3 * SAMPLES, 3 * SAMPLES)
    kept = (stats.latency_s, stats.first_token_s, stats.tokens_per_s)
    assert [len(values) for values in kept] == [SAMPLES] * 3


@pytest.mark.parametrize("rated_every", [1, 4])
def test_each_request_has_the_same_chance_to_be_in_a_sample(
    monkeypatch: pytest.MonkeyPatch, rated_every: int
) -> None:
    """Also where only some requests have such a value: the early and the late are as many."""
    monkeypatch.setattr(recorder, "SAMPLES", 100)
    requests, runs = 2_000, 30
    kept: list[float] = []
    for seed in range(runs):
        own = opened(random.Random(seed))
        for number in range(requests):
            rated = number % rated_every == 0
            record(own, first_token_s=0.0, latency_s=1 / (number + 1), tokens=2 if rated else 1)
            record(own, failed=True)
        [stats] = own.request_stats.values()
        assert len(stats.latency_s) == len(stats.tokens_per_s) == 100
        kept += stats.tokens_per_s  # the number of the request, and 1
    late = sum(number > requests / 2 for number in kept) / len(kept)
    assert late == pytest.approx(0.5, abs=0.04)  # of 3,000: 4 standard deviations
    last_tenth = sum(number > 0.9 * requests for number in kept) / len(kept)
    assert last_tenth == pytest.approx(0.1, abs=0.025)


def test_the_sample_of_one_replica_is_enough_for_any_plan() -> None:
    """A dedicated canary may have one replica, and would wait for data forever."""
    checks = [Check(metric="latency", max=1)]
    make = TypeAdapter(Analysis).validate_python
    make({"checks": checks, "min_samples": SAMPLES})
    with pytest.raises(ValidationError):
        make({"checks": checks, "min_samples": SAMPLES + 1})


# ---- sums ---------------------------------------------------------------------------------------


def test_statistics_of_two_replicas_add_up_and_stay_as_they_are() -> None:
    one = RequestStats(requests=3, errors=1, chosen=2, latency_s=[1.0, 2.0], first_token_s=[0.5])
    other = RequestStats(requests=1, chosen=1, latency_s=[3.0], tokens_per_s=[7.0])
    assert one + other == RequestStats(
        requests=4,
        errors=1,
        chosen=3,
        latency_s=[1.0, 2.0, 3.0],
        first_token_s=[0.5],
        tokens_per_s=[7.0],
    )
    assert (one.requests, len(one.latency_s), other.latency_s) == (3, 2, [3.0])
