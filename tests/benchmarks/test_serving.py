"""The serving benchmark's load, statistics and verdicts, without timing anything."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from benchmarks.load import (
    PROMPT_TOKENS,
    Body,
    Sample,
    arrivals,
    closed_loop,
    completions,
    prompts,
    seen_in,
)
from benchmarks.serving import document, failed
from benchmarks.serving_figures import (
    Figure,
    latencies,
    paired,
    percentile,
    split,
    split_by_arrival,
    verdict,
)
from benchmarks.serving_throughput import with_canary
from benchmarks.serving_world import QUICK, World

WINDOWS = [(10.0, 11.0), (20.0, 21.0)]


def sample(due_at: float, ended_at: float, first_at: float | None = None) -> Sample:
    return Sample(index=0, due_at=due_at, ended_at=ended_at, first_at=first_at)


def test_a_value_at_the_limit_holds_the_bar() -> None:
    assert verdict("≥ 0.9", 0.9) == "held"
    assert verdict("≥ 0.9", 0.89) == "missed"
    assert verdict("≤ 1.2", 1.2) == "held"
    assert verdict("≤ 1.2", 1.21) == "missed"


def test_a_missing_measurement_misses_every_bar() -> None:
    assert verdict("≤ 1.2", math.nan) == "missed"
    assert verdict("≥ 0.9", math.nan) == "missed"


def test_only_wrong_answers_fail_a_run() -> None:
    slow = Figure(name="slow", value=9, bar="≤ 1")
    wrong = Figure(name="wrong", value=1, bar="≤ 0", fails=True)
    assert not failed(slow)
    assert failed(wrong)
    assert not failed(Figure(name="right", value=0, bar="≤ 0", fails=True))


def test_a_figure_without_a_bar_is_reported() -> None:
    assert Figure(name="price", value=0.8).verdict == "reported"


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)]
)
def test_a_percentile_is_a_value_that_was_measured(percent: float, value: float) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value


def test_without_values_a_percentile_is_nan() -> None:
    assert math.isnan(percentile([], 99))


def test_ratios_are_taken_within_a_round() -> None:
    # the machine became ten times slower between the rounds
    assert paired([9, 0.9, 8], [10, 1, 10]) == 0.9


def test_a_request_meets_a_swap_if_it_runs_at_any_time_during_it() -> None:
    before, into, inside, over, after = (
        sample(8, 10),
        sample(9, 10.5),
        sample(10.2, 10.4),
        sample(19, 23),
        sample(11, 12),
    )
    during, steady = split([before, into, inside, over, after], WINDOWS)
    assert during == [into, inside, over]
    assert steady == [before, after]


def test_by_arrival_a_slow_request_is_not_counted_for_being_slow() -> None:
    usual = [sample(at, at + 1) for at in (1, 2, 3, 9.5)]
    slow = sample(4, 15)
    during, steady = split_by_arrival([*usual, slow], WINDOWS)
    assert during == [usual[-1]]
    assert slow in steady


def test_latency_counts_from_when_a_request_was_due() -> None:
    found = latencies([sample(0, 3, first_at=1), sample(0, 1, first_at=0.5)])
    assert found["requests"] == 2
    assert (found["latency_p50_s"], found["latency_max_s"]) == (1, 3)
    assert (found["first_token_p50_s"], found["first_token_max_s"]) == (0.5, 1)


def test_the_same_seed_gives_the_same_prompts_and_arrivals() -> None:
    assert prompts(3, 20, vocabulary=1000) == prompts(3, 20, vocabulary=1000)
    assert prompts(3, 20, vocabulary=1000) != prompts(4, 20, vocabulary=1000)
    assert arrivals(1, per_second=5, seconds=9) == arrivals(1, per_second=5, seconds=9)


def test_prompts_have_mixed_lengths_and_known_tokens() -> None:
    asked = prompts(0, 500, vocabulary=300)
    assert {min(map(len, asked)), max(map(len, asked))} == set(PROMPT_TOKENS)
    assert max(max(ids) for ids in asked) < 300


def test_arrivals_have_the_requested_rate() -> None:
    due = arrivals(0, per_second=10, seconds=1000)
    assert due == sorted(due)
    assert due[-1] < 1000
    assert abs(len(due) - 10_000) < 300  # three standard deviations


def test_every_tenth_request_names_the_canary() -> None:
    bodies = with_canary(completions([[1]] * 30, max_tokens=4), "tiny:canary")
    assert [i for i, body in enumerate(bodies) if "model" in body] == [0, 10, 20]


def test_a_closed_loop_keeps_every_client_busy_and_sends_each_request_once() -> None:
    running, most = 0, 0

    async def ask(index: int, _: Body, due_at: float) -> Sample:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return Sample(index=index, due_at=due_at, ended_at=due_at)

    samples = asyncio.run(closed_loop(ask, [{}] * 50, clients=4))
    assert sorted(one.index for one in samples) == list(range(50))
    assert most == 4


def test_a_sample_has_the_tokens_and_the_revision_of_its_answer() -> None:
    answer = {
        "usage": {"completion_tokens": 3},
        "system_fingerprint": "pirate@1",
        "choices": [{"token_ids": [1, 2, 3]}],
    }
    assert seen_in(answer) == {"tokens": 3, "revision": "pirate@1", "token_ids": (1, 2, 3)}


def test_the_document_lists_the_rows_that_could_not_be_measured(tmp_path: Path) -> None:
    world = World(
        model="tiny",
        base="tiny",
        adapters=(tmp_path,),
        folder=tmp_path,
        effort=QUICK,
        exact=False,
        compile=False,
    )
    figures = [Figure(name="of nothing", value=math.nan, bar="≤ 1.2")]
    found = document(world, figures, ["steps: it broke"], took_s=1.0)
    assert found["figures"][0]["value"] is None
    assert found["figures"][0]["verdict"] == "missed"
    assert found["not measured"] == ["steps: it broke"]
