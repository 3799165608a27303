"""The fleet in a terminal: its contents, and that they fit."""

from __future__ import annotations

import pytest
from rich.console import RenderableType

from serve_app.client.terminal import adapters_screen, fleet_screen, history_screen
from serve_app.wire.admin import AdapterList, AdapterView, FleetView, ReplicaView
from tests.serve_app.client.views import CANARY, FLEET, NEW, OLD, ROLLOUT, drawn, with_canary


def row(picture: RenderableType, start: str, width: int = 80) -> list[str]:
    return next(line.split() for line in drawn(picture, width).splitlines() if line[:6] == start)


def test_the_header_has_the_stable_revision_and_the_rollouts_progress() -> None:
    text = drawn(fleet_screen(FLEET))
    assert f"stable   {OLD}  1/2 serving  epoch 3, generation 17" in text
    assert f"rollout  r-0007  {OLD} → {NEW}" in text
    assert "rolling  progressing" in text
    assert "1/2 committed, 2/2 staged" in text


def test_loaded_adapters_have_a_row_that_counts_replicas_only_where_some_lack_one() -> None:
    assert "loaded" not in drawn(fleet_screen(FLEET))
    one, two = "alpha@11111111", "beta@22222222"
    replicas = [
        FLEET.replicas[0].model_copy(update={"serves": [NEW, one, two]}),
        FLEET.replicas[1].model_copy(update={"serves": [OLD, one]}),
    ]
    fleet = FLEET.model_copy(update={"loaded": [one, two], "replicas": replicas})
    assert f"loaded   {one}  {two} 1/2 " in drawn(fleet_screen(fleet), 120)


def test_of_many_loaded_adapters_only_some_are_named() -> None:
    many = [f"bot{number}@{number:08x}" for number in range(30)]
    fleet = FLEET.model_copy(update={"loaded": many, "replicas": []})
    text = drawn(fleet_screen(fleet), 400)
    assert many[7] in text
    assert many[8] not in text
    assert "and 22 more" in text


def test_loaded_adapters_have_a_line_each_and_the_generation_comes_last() -> None:
    adapters = [
        AdapterView(
            lora_name=name,
            lora_path=f"/{name}",
            revision=f"{name}@1",
            generation=4,
            ready=1,
            total=2,
        )
        for name in ("a", "longer")
    ]
    assert drawn(adapters_screen(AdapterList(data=adapters, generation=4))) == (
        "a       a@1  1/2 serve it  /a\nlonger  longer@1  1/2 serve it  /longer\ngeneration 4\n"
    )
    empty = drawn(adapters_screen(AdapterList(data=[], generation=4)))
    assert empty == "no adapters are loaded\ngeneration 4\n"


def test_a_given_rollout_replaces_the_one_in_the_fleet() -> None:
    done = {"state": "succeeded", "ended_at": 2.0, "committed": 2, "converge_ms": 812.3}
    text = drawn(fleet_screen(FLEET, ROLLOUT.model_copy(update=done)))
    assert "succeeded" in text
    assert "2/2 committed in 812 ms" in text
    assert "progressing" not in text


def test_a_replica_row_has_its_revisions_and_the_times_of_its_last_swap() -> None:
    cells = row(fleet_screen(FLEET), "k3j9x0", width=120)
    assert cells == ["k3j9x0", NEW, "target", "-", "yes", "3", "0", "12", "ms", "184", "µs"]
    cells = row(fleet_screen(FLEET), "q81mz2", width=120)
    assert cells == ["q81mz2", OLD, "stable", "target", "no", "0", "0", "-", "-"]


def test_a_revision_that_is_neither_stable_nor_target_is_named() -> None:
    replica = ReplicaView(id="lonely", revision=None, assigned="x@77777777", staged="y@88888888")
    cells = row(fleet_screen(FLEET.model_copy(update={"replicas": [replica]})), "lonely", width=120)
    assert cells[:4] == ["lonely", "-", "x@77777777", "y@88888888"]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_over_the_width_and_no_row_breaks(width: int) -> None:
    lines = drawn(fleet_screen(FLEET), width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("9b1c22aa" in line for line in lines) == 2  # the header, and one line of the table
    assert all(heading in "\n".join(lines) for heading in ("compiles", "stage", "commit"))


def test_failures_and_warnings_each_have_a_line_and_name_the_replica() -> None:
    broken = FLEET.replicas[0].model_copy(update={"failure": "verify\nfailed", "limit_hits": 2})
    fleet = FLEET.model_copy(update={"replicas": [broken]})
    lines = drawn(fleet_screen(fleet, ROLLOUT.model_copy(update={"reason": "too slow"})))
    assert "failure  rollout r-0007: too slow\n" in lines
    assert "failure  k3j9x0: verify failed\n" in lines
    assert "warning  the journal is local\n" in lines
    assert "warning  k3j9x0: 2 frames fell back to eager since warm-up\n" in lines


def test_brackets_from_outside_are_text_and_not_markup() -> None:
    assert "[red]x[/nope]" in drawn(
        fleet_screen(FLEET.model_copy(update={"warnings": ["[red]x[/nope]"]}))
    )


def test_an_empty_fleet_is_drawn_without_a_table() -> None:
    empty = FleetView(ready=False, epoch=1, generation=0, stable=OLD, journal_uri="/j")
    text = drawn(fleet_screen(empty))
    assert "no replica serves" in text
    assert "assigned" not in text
    without_replicas = ROLLOUT.model_copy(update={"total": 0, "staged": 0, "committed": 0})
    assert "0/0 committed" in drawn(fleet_screen(empty, without_replicas))


def test_history_ends_with_the_newest_and_marks_stable() -> None:
    assert drawn(history_screen(FLEET)) == f"1  base@00000000\n2  {OLD}  stable\n"


def test_an_empty_history_says_so() -> None:
    assert drawn(history_screen(FLEET.model_copy(update={"history": []}))) == "no history yet\n"


def test_the_fleets_screen_has_the_canary_and_every_measurement() -> None:
    fleet = FLEET.model_copy(update={"rollout": CANARY})
    text = drawn(fleet_screen(fleet), 100)
    assert "canary   step 1/2  10 %, shared  9.81 % of 320 requests measured  waits" in text
    assert "verdict  pass  error_rate is 0.003" in text
    assert "inconclusive  31 of 50 [samples]" in text
    assert "canary" not in drawn(fleet_screen(FLEET))


def test_a_pause_by_a_user_or_by_the_plan_is_not_a_failure() -> None:
    for rollout in (CANARY, with_canary(pause="asked")):
        assert "failure" not in drawn(fleet_screen(FLEET, rollout))
    asked = ROLLOUT.model_copy(update={"state": "paused", "reason": "paused"})
    assert "failure" not in drawn(fleet_screen(FLEET, asked))
    failed = with_canary(pause="failure")
    assert "failure  rollout r-0007: step 1 of 2" in drawn(fleet_screen(FLEET, failed))


@pytest.mark.parametrize("width", [60, 80])
def test_a_canary_fits_into_the_width(width: int) -> None:
    text = drawn(fleet_screen(FLEET.model_copy(update={"rollout": CANARY})), width)
    assert max(map(len, text.splitlines())) <= width
