"""Rollouts and canaries in one line."""

from __future__ import annotations

import pytest

from serve_app.client.terminal import fleet_screen
from serve_app.client.terminal_rollout import rollout_line, rollouts_screen
from serve_app.wire.admin import RolloutList
from tests.serve_app.client.views import CANARY, FLEET, LOOK, NEW, OLD, ROLLOUT, drawn, with_canary


def test_a_rollout_in_one_line_says_how_it_ended() -> None:
    assert drawn(rollout_line(ROLLOUT), 200) == (
        f"r-0007  {OLD} → {NEW}  rolling  progressing  1/2 committed, 2/2 staged\n"
    )
    bad = ROLLOUT.model_copy(update={"state": "aborted", "reason": "asked", "converge_ms": 9.0})
    assert drawn(rollout_line(bad), 200).endswith("aborted  1/2 committed, 2/2 staged  (asked)\n")


def test_a_rollout_shows_its_mode_for_running_requests() -> None:
    overlap = ROLLOUT.model_copy(update={"in_flight": "overlap"})
    assert "rolling, overlap  progressing" in drawn(rollout_line(overlap), 200)
    assert "rolling, overlap  progressing" in drawn(fleet_screen(FLEET, overlap), 80)


def test_an_empty_list_of_rollouts_says_so() -> None:
    assert drawn(rollouts_screen(RolloutList(data=[]))) == "no rollouts yet\n"
    assert "r-0007" in drawn(rollouts_screen(RolloutList(data=[ROLLOUT])))


def test_a_canary_in_one_line_has_its_step_its_share_its_pause_and_its_verdict() -> None:
    line = rollout_line(CANARY).plain
    words = "step 1/2  10 %, shared  9.81 % of 320 requests measured  waits to be promoted"
    assert f"{words}  inconclusive  (step 1 of 2 waits to be promoted)" in line
    assert "canary  paused" in line


@pytest.mark.parametrize(
    ("pause", "words"),
    [("asked", "paused by request"), ("failure", "waits after a failure"), ("moon", "moon")],
)
def test_a_paused_canary_shows_the_reason(pause: str, words: str) -> None:
    assert f"  {words}  " in rollout_line(with_canary(pause=pause)).plain


def test_a_canary_that_has_ended_shows_its_last_verdict_and_no_weight() -> None:
    passed = LOOK.model_copy(update={"outcome": "pass", "step": 1})
    done = with_canary(step=2, weight=0, pause=None, latest=None, verdicts=[LOOK, passed])
    done = done.model_copy(update={"state": "succeeded", "ended_at": 3.0, "reason": None})
    assert rollout_line(done).plain.endswith("past step 2/2  9.81 % of 320 requests measured  pass")


def test_a_canary_that_has_not_been_analysed_shows_no_verdict() -> None:
    line = rollout_line(with_canary(latest=None, pause=None)).plain
    assert "  step 1/2  10 %, shared  (" in line
    assert "measured" not in line
