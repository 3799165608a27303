"""Who gets the canary: shares that are right, and sessions that stay."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.rollout.state import Traffic
from serve_app.rollout.traffic_split import TrafficSplit, session_position

SESSIONS = [f"user {number}" for number in range(4_000)]
weights = st.floats(0, 100)


def traffic(weight: float, canary: str = "beta@1") -> Traffic:
    return Traffic(canary=canary, weight=weight, placement="shared", step_id="r1.1.1")


def on_canary(weight: float, canary: str = "beta@1") -> set[str]:
    split = TrafficSplit(start=0.0)
    return {each for each in SESSIONS if split.to_canary(traffic(weight, canary), each)}


@settings(deadline=None)
@given(weight=weights, start=st.floats(0, 1, exclude_max=True), requests=st.integers(1, 3_000))
def test_after_any_number_of_requests_the_share_is_right_to_a_few_of_them(
    weight: float, start: float, requests: int
) -> None:
    split = TrafficSplit(start=start)
    there = sum(split.to_canary(traffic(weight), None) for _ in range(requests))
    assert abs(there - requests * weight / 100) <= 5  # the worst of this range is 4.2


def test_a_new_weight_counts_from_the_next_request_on() -> None:
    split = TrafficSplit(start=0.3)
    for weight in (10.0, 90.0, 50.0, 1.0):
        there = sum(split.to_canary(traffic(weight), None) for _ in range(1_000))
        assert abs(there - 10 * weight) <= 4


@settings(deadline=None)
@given(session=st.none() | st.text(), start=st.floats(0, 1, exclude_max=True))
def test_no_request_gets_a_canary_of_0_percent_and_every_request_one_of_100(
    session: str | None, start: float
) -> None:
    split = TrafficSplit(start=start)
    assert not split.to_canary(traffic(0), session)
    assert split.to_canary(traffic(100), session)


@settings(deadline=None)
@given(session=st.text(), canary=st.text(), low=weights, high=weights)
def test_a_session_that_is_on_the_canary_stays_when_the_weight_grows(
    session: str, canary: str, low: float, high: float
) -> None:
    low, high = sorted((low, high))
    assert 0 <= session_position(session, canary) < 1
    if TrafficSplit(start=0.0).to_canary(traffic(low, canary), session):
        assert TrafficSplit(start=0.0).to_canary(traffic(high, canary), session)


def test_sessions_do_not_use_up_the_turns_of_the_others() -> None:
    some, others = TrafficSplit(start=0.5), TrafficSplit(start=0.5)
    for number in range(500):
        some.to_canary(traffic(30), f"session {number}")
        assert some.to_canary(traffic(30), None) == others.to_canary(traffic(30), None)


def test_the_share_of_the_sessions_is_close_to_the_weight() -> None:
    for weight in (1.0, 20.0, 75.0):
        share = 100 * len(on_canary(weight)) / len(SESSIONS)
        assert abs(share - weight) < 3


def test_another_canary_begins_with_other_sessions() -> None:
    ours, theirs = on_canary(20, "beta@1"), on_canary(20, "beta@2")
    both = len(ours & theirs) / len(SESSIONS)
    assert abs(both - 0.2 * 0.2) < 0.02, "they are not chosen independently"


def test_every_process_places_a_session_the_same() -> None:
    ask = (
        "from serve_app.rollout.traffic_split import session_position as position;"
        "print(repr(position('ann', 'beta@1')))"
    )
    run = [sys.executable, "-c", ask]
    said = {subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()}
    assert said == {repr(session_position("ann", "beta@1"))} == {"0.3889977451540668"}
