"""`hotswap rollout`: plans, steps, watching, and the verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from serve_app.wire.admin import RolloutView
from tests.serve_app.client.fake_fleet import HAPPY, NEW, OLD, FakeFleet, hotswap


def test_start_returns_once_accepted_and_says_how_to_watch() -> None:
    fake = FakeFleet()
    result = hotswap(fake, "rollout", "start", "--adapter", "org/pirate")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"r1  {OLD} → {NEW}  rolling  pending  0/2 committed, 0/2 staged",
        "watch: hotswap --url http://127.0.0.1:8000 rollout get r1 --watch",
    ]
    assert fake.asked == [{"adapter": "org/pirate"}], "the defaults are the server's"


def test_start_sends_every_option() -> None:
    fake = FakeFleet()
    options = ["--name", "n", "--strategy", "all_at_once", "--max-unavailable", "3"]
    options += ["--in-flight", "drain"]
    hotswap(fake, "rollout", "start", "--adapter", "x", *options)
    asked = {"adapter": "x", "name": "n", "strategy": "all_at_once", "max_unavailable": 3}
    assert fake.asked == [asked | {"in_flight": "drain"}]


# ---- plans --------------------------------------------------------------------------------------

PLAN = """
adapter: s3://models/support-bot/v7   # YAML, with durations such as 2m
strategy: canary
steps:
  - {weight: 10, hold: 2m}
  - {weight: 50, hold: manual}
analysis:
  checks:
    - {metric: error_rate, max: 0.01}
"""

SENT = {
    "adapter": "s3://models/support-bot/v7",
    "strategy": "canary",
    "steps": [{"weight": 10.0, "hold": 120.0}, {"weight": 50.0, "hold": "manual"}],
    "analysis": {"checks": [{"metric": "error_rate", "max": 0.01}]},
}


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_plan_comes_from_a_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"plan.{kind}"
    file.write_text(PLAN if kind == "yaml" else json.dumps(yaml.safe_load(PLAN)))
    fake = FakeFleet()
    result = hotswap(fake, "rollout", "start", "--plan", str(file))
    assert (result.exit_code, fake.asked) == (0, [SENT])


def test_options_override_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN)
    fake = FakeFleet()
    over = ["--adapter", "org/other", "--step", "25:30s", "--step", "75"]
    over += ["--placement", "dedicated", "--progress-deadline", "5m", "--on-failure", "pause"]
    hotswap(fake, "rollout", "start", "--plan", str(file), *over)
    changed = {
        "adapter": "org/other",
        "steps": [{"weight": 25.0, "hold": 30.0}, {"weight": 75.0}],
        "placement": "dedicated",
        "progress_deadline": 300.0,
        "on_failure": "pause",
    }
    assert fake.asked == [SENT | changed]


def test_a_local_adapter_in_a_plan_is_sent_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pirate").mkdir()
    (tmp_path / "plan.yaml").write_text("adapter: pirate")
    monkeypatch.chdir(tmp_path)
    fake = FakeFleet()
    hotswap(fake, "rollout", "start", "--plan", "plan.yaml")
    assert fake.asked == [{"adapter": str(tmp_path / "pirate")}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: "),
        (b"adapter: [", "cannot be read: "),
        (b"\xff\xfe\x00", "cannot be read: "),
        (b"", "is not a mapping of fields to values"),
        (b"- adapter", "is not a mapping of fields to values"),
        (b"strategy: rolling", "adapter: Field required"),
        (b"adapter: x\nweight: 10", "weight: Extra inputs are not permitted"),
        (b"adapter: x\n10: 20", "10: "),
        (b"adapter: x\nprogress_deadline: soon", "progress_deadline: "),
        (b"adapter: x\nstrategy: canary", "plan: a canary needs steps"),
    ],
)
def test_a_bad_plan_exits_2_with_the_reason_and_sends_nothing(
    tmp_path: Path, content: bytes | None, why: str
) -> None:
    file = tmp_path / "plan.yaml"
    if content is not None:
        file.write_bytes(content)
    fake = FakeFleet()
    result = hotswap(fake, "rollout", "start", "--plan", str(file))
    assert (result.exit_code, fake.tokens) == (2, set())
    assert why in " ".join(result.stderr.split())


@pytest.mark.parametrize("step", ["", "ten", "10:", "10:soon", "0", "101", "10:30s:1", ":30s"])
def test_a_bad_step_exits_2_and_sends_nothing(step: str) -> None:
    fake = FakeFleet()
    args = ["--adapter", "x", "--strategy", "canary", "--step", step]
    result = hotswap(fake, "rollout", "start", *args)
    assert (result.exit_code, fake.tokens) == (2, set())
    assert "steps.0" in result.stderr


def test_a_local_adapter_is_sent_as_an_absolute_path_and_any_other_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pirate").mkdir()
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    fake = FakeFleet()
    for adapter in ("./pirate", "pirate/../pirate", "./absent", "s3://bucket/pirate", "base"):
        fake.states = ["pending"]
        hotswap(fake, "rollout", "start", "--adapter", adapter)
    here = str(tmp_path / "pirate")
    sent = [asked["adapter"] for asked in fake.asked]
    assert sent == [here, here, "./absent", "s3://bucket/pirate", "base"]


# ---- the course of a rollout --------------------------------------------------------------------


def test_a_watched_rollout_that_is_promoted_exits_0_and_prints_each_state_once() -> None:
    result = hotswap(FakeFleet(), "rollout", "start", "--adapter", "x", "--watch")
    assert result.exit_code == 0
    shown = [line.split("rolling  ")[1].split()[0] for line in result.stdout.splitlines()]
    assert shown == HAPPY[1:]


@pytest.mark.parametrize("end", ["aborted", "failed", "superseded"])
def test_a_watched_rollout_that_is_not_promoted_exits_3_with_the_reason(end: str) -> None:
    fake = FakeFleet(states=["pending", "progressing", end])
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--watch")
    why = "the server gave no reason" if end == "superseded" else "it took too long"
    assert result.exit_code == 3
    assert result.stderr == f"error: r1 to {NEW} was not promoted: {why} [{end}]\n"


def test_a_watch_lives_through_an_outage() -> None:
    fake = FakeFleet(states=["pending", "succeeded"], outages=2)
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--watch")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_terminal_sees_the_live_screen() -> None:
    fake = FakeFleet(states=["pending", "progressing", "succeeded"])
    args = ["rollout", "start", "--adapter", "x", "--watch"]
    result = hotswap(fake, *args, env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert result.exit_code == 0
    assert "abc123" in result.stdout
    assert "succeeded" in result.stdout


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_json_prints_one_document_only(watch: list[str]) -> None:
    fake = FakeFleet(states=["pending", "failed"])
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--json", *watch)
    assert fake.rollout
    assert RolloutView.model_validate_json(result.stdout) == fake.rollout
    assert result.exit_code == (3 if watch else 0)


def test_get_list_abort_and_history_show_lines() -> None:
    fake = FakeFleet(states=[])
    fake.enter("progressing")
    assert hotswap(fake, "rollout", "get", "r1").stdout.startswith(f"r1  {OLD} → {NEW}")
    assert hotswap(fake, "rollout", "list").stdout.startswith(f"r1  {OLD} → {NEW}")
    assert "aborting" in hotswap(fake, "rollout", "abort", "r1").stdout
    assert hotswap(fake, "history").stdout == f"1  base@00000000\n2  {OLD}  stable\n"


def test_get_can_watch_a_rollout_that_was_started_before() -> None:
    fake = FakeFleet(states=["promoting", "succeeded"])
    fake.enter("progressing")
    assert hotswap(fake, "rollout", "get", "r1", "--watch").exit_code == 0
    assert fake.rollout
    assert fake.rollout.state == "succeeded"


@pytest.mark.parametrize("verb", ["promote", "resume", "retry"])
@pytest.mark.parametrize(("end", "code"), [("succeeded", 0), ("aborted", 3), ("failed", 3)])
def test_a_verb_that_is_watched_exits_as_its_rollout_ends(verb: str, end: str, code: int) -> None:
    fake = FakeFleet(states=["progressing", "progressing", end])
    fake.enter("paused")
    assert hotswap(fake, "rollout", verb, "r1", "--watch").exit_code == code


def test_pause_shows_the_rollout_that_it_paused() -> None:
    fake = FakeFleet(states=["paused"])
    fake.enter("progressing")
    result = hotswap(fake, "rollout", "pause", "r1")
    assert (result.exit_code, "paused" in result.stdout) == (0, True)
