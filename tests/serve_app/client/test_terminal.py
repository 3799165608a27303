"""The terminal pictures: what they say, and that they fit."""

from __future__ import annotations

import pytest
from rich.console import Console, RenderableType

from serve_app.client.terminal import (
    PALETTE,
    RevisionCell,
    adapters_screen,
    fleet_screen,
    history_screen,
    revision_style,
    rollout_line,
    rollouts_screen,
    short_ids,
)
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    CanaryView,
    FleetView,
    MeasurementView,
    ReplicaView,
    RolloutList,
    RolloutView,
    SwapView,
    VerdictView,
)

OLD = "pirate@3f2a9c1d"
NEW = "terse-json-speaker@9b1c22aa"
SWAP = SwapView(revision=NEW, stage_ms=12.4, commit_us=184)

ROLLOUT = RolloutView(
    id="r-0007",
    target=NEW,
    previous=OLD,
    strategy="rolling",
    max_unavailable=1,
    state="progressing",
    total=2,
    staged=2,
    committed=1,
    created_at=1.0,
)
FLEET = FleetView(
    ready=True,
    epoch=3,
    generation=17,
    stable=OLD,
    rollout=ROLLOUT,
    replicas=[
        ReplicaView(
            id="default#Model#k3j9x0ab",
            revision=NEW,
            assigned=NEW,
            serving=True,
            running=3,
            last_swap=SWAP,
        ),
        ReplicaView(id="default#Model#q81mz2cd", revision=OLD, assigned=OLD, staged=NEW),
    ],
    history=["base@00000000", OLD],
    journal_uri="/tmp/journal",
    warnings=["the journal is local"],
)


LOOK = VerdictView(
    step=0,
    weight=10,
    outcome="inconclusive",
    at=2.0,
    share=9.8125,
    requests=320,
    measurements=[
        MeasurementView(name="error_rate", outcome="pass", why="error_rate is 0.003"),
        MeasurementView(name="latency p95", outcome="inconclusive", why="31 of 50 [samples]"),
    ],
)
CANARY = ROLLOUT.model_copy(
    update={
        "strategy": "canary",
        "state": "paused",
        "reason": "step 1 of 2 waits to be promoted",
        "canary": CanaryView(
            placement="shared", step=0, steps=[10, 50], weight=10, pause="step", latest=LOOK
        ),
    }
)


def drawn(picture: RenderableType, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(picture)
    return captured.get()


def row(picture: RenderableType, start: str, width: int = 80) -> list[str]:
    return next(line.split() for line in drawn(picture, width).splitlines() if line[:6] == start)


def test_the_header_names_stable_and_the_rollout_and_how_far_it_is() -> None:
    text = drawn(fleet_screen(FLEET))
    assert f"stable   {OLD}  1/2 serving  epoch 3, generation 17" in text
    assert f"rollout  r-0007  {OLD} → {NEW}" in text
    assert "rolling  progressing" in text
    assert "1/2 committed, 2/2 staged" in text


def test_what_is_loaded_beside_has_a_row_that_names_only_what_is_missing() -> None:
    assert "beside" not in drawn(fleet_screen(FLEET))
    one, two = "alpha@11111111", "beta@22222222"
    replicas = [
        FLEET.replicas[0].model_copy(update={"serves": [NEW, one, two]}),
        FLEET.replicas[1].model_copy(update={"serves": [OLD, one]}),
    ]
    fleet = FLEET.model_copy(update={"loaded": [one, two], "replicas": replicas})
    assert f"beside   {one}  {two} 1/2 " in drawn(fleet_screen(fleet), 120)


def test_of_many_that_are_loaded_only_some_are_named() -> None:
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


def test_a_rollout_says_what_becomes_of_running_requests() -> None:
    overlap = ROLLOUT.model_copy(update={"in_flight": "overlap"})
    assert "rolling, overlap  progressing" in drawn(rollout_line(overlap), 200)
    assert "rolling, overlap  progressing" in drawn(fleet_screen(FLEET, overlap), 80)


def test_a_rollout_that_is_given_outranks_the_one_in_the_fleet() -> None:
    done = {"state": "succeeded", "ended_at": 2.0, "committed": 2, "converge_ms": 812.3}
    text = drawn(fleet_screen(FLEET, ROLLOUT.model_copy(update=done)))
    assert "succeeded" in text
    assert "2/2 committed in 812 ms" in text
    assert "progressing" not in text


def test_a_replica_row_says_what_it_holds_and_what_its_last_swap_took() -> None:
    cells = row(fleet_screen(FLEET), "k3j9x0", width=120)
    assert cells == ["k3j9x0", NEW, "target", "-", "yes", "3", "0", "12", "ms", "184", "µs"]
    cells = row(fleet_screen(FLEET), "q81mz2", width=120)
    assert cells == ["q81mz2", OLD, "stable", "target", "no", "0", "0", "-", "-"]


def test_a_revision_that_is_neither_stable_nor_target_is_named() -> None:
    stray = ReplicaView(id="strays", revision=None, assigned="x@77777777", staged="y@88888888")
    cells = row(fleet_screen(FLEET.model_copy(update={"replicas": [stray]})), "strays", width=120)
    assert cells[:4] == ["strays", "-", "x@77777777", "y@88888888"]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_over_the_width_and_no_row_breaks(width: int) -> None:
    lines = drawn(fleet_screen(FLEET), width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("9b1c22aa" in line for line in lines) == 2  # the header, and one line of the table
    assert all(heading in "\n".join(lines) for heading in ("compiles", "stage", "commit"))


def test_a_narrow_revision_keeps_its_digest_and_gives_up_its_name() -> None:
    cell = RevisionCell("support-bot@3f2a9c1d")
    assert cell.shortened(20) == "support-bot@3f2a9c1d"
    assert cell.shortened(14) == "supp…@3f2a9c1d"
    assert cell.shortened(10) == "…@3f2a9c1d"
    assert cell.shortened(4) == "sup…"
    assert RevisionCell("no-digest-at-all").shortened(5) == "no-d…"


def test_a_revision_has_one_colour_in_every_process() -> None:
    assert {revision_style(f"r@{n:08x}") for n in range(200)} == set(PALETTE)
    assert [revision_style("a@1"), revision_style("b@2")] == ["green", "magenta"]


def test_ids_are_as_short_as_still_tells_them_apart() -> None:
    assert short_ids(["app#Model#abcdefgh", "app#Model#xyzxyzxyz"]) == {
        "app#Model#abcdefgh": "abcdef",
        "app#Model#xyzxyzxyz": "xyzxyz",
    }
    assert list(short_ids(["Model#abcdef1x", "Model#abcdef2x"]).values()) == ["abcdef1", "abcdef2"]
    assert list(short_ids(["a#same", "b#same"]).values()) == ["a#same", "b#same"]
    assert short_ids([]) == {}


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
    nobody = ROLLOUT.model_copy(update={"total": 0, "staged": 0, "committed": 0})
    assert "0/0 committed" in drawn(fleet_screen(empty, nobody))


def test_a_rollout_in_one_line_says_how_it_ended() -> None:
    assert drawn(rollout_line(ROLLOUT), 200) == (
        f"r-0007  {OLD} → {NEW}  rolling  progressing  1/2 committed, 2/2 staged\n"
    )
    bad = ROLLOUT.model_copy(update={"state": "aborted", "reason": "asked", "converge_ms": 9.0})
    assert drawn(rollout_line(bad), 200).endswith("aborted  1/2 committed, 2/2 staged  (asked)\n")


def test_lists_say_so_when_they_are_empty() -> None:
    assert drawn(rollouts_screen(RolloutList(data=[]))) == "no rollouts yet\n"
    assert "r-0007" in drawn(rollouts_screen(RolloutList(data=[ROLLOUT])))
    assert drawn(history_screen(FLEET.model_copy(update={"history": []}))) == "no history yet\n"


def test_history_ends_with_the_newest_and_marks_stable() -> None:
    assert drawn(history_screen(FLEET)) == f"1  base@00000000\n2  {OLD}  stable\n"


# ---- canaries -----------------------------------------------------------------------------------


def with_canary(**changed: object) -> RolloutView:
    assert CANARY.canary is not None
    return CANARY.model_copy(update={"canary": CANARY.canary.model_copy(update=changed)})


def test_a_canary_in_one_line_says_its_step_its_share_what_it_waits_for_and_its_verdict() -> None:
    line = rollout_line(CANARY).plain
    words = "step 1/2  10 %, shared  9.81 % of 320 requests measured  waits to be promoted"
    assert f"{words}  inconclusive  (step 1 of 2 waits to be promoted)" in line
    assert "canary  paused" in line


@pytest.mark.parametrize(
    ("pause", "words"),
    [("asked", "paused by request"), ("failure", "waits after a failure"), ("moon", "moon")],
)
def test_a_canary_says_what_it_waits_for(pause: str, words: str) -> None:
    assert f"  {words}  " in rollout_line(with_canary(pause=pause)).plain


def test_a_canary_that_has_ended_shows_its_last_verdict_and_no_weight() -> None:
    passed = LOOK.model_copy(update={"outcome": "pass", "step": 1})
    done = with_canary(step=2, weight=0, pause=None, latest=None, verdicts=[LOOK, passed])
    done = done.model_copy(update={"state": "succeeded", "ended_at": 3.0, "reason": None})
    assert rollout_line(done).plain.endswith("past step 2/2  9.81 % of 320 requests measured  pass")


def test_a_canary_that_nobody_has_looked_at_yet_says_nothing_of_a_verdict() -> None:
    line = rollout_line(with_canary(latest=None, pause=None)).plain
    assert "  step 1/2  10 %, shared  (" in line
    assert "measured" not in line


def test_the_fleets_picture_has_the_canary_and_every_measurement() -> None:
    fleet = FLEET.model_copy(update={"rollout": CANARY})
    text = drawn(fleet_screen(fleet), 100)
    assert "canary   step 1/2  10 %, shared  9.81 % of 320 requests measured  waits" in text
    assert "verdict  pass  error_rate is 0.003" in text
    assert "inconclusive  31 of 50 [samples]" in text
    assert "canary" not in drawn(fleet_screen(FLEET))


def test_a_pause_that_somebody_wanted_is_no_failure() -> None:
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
