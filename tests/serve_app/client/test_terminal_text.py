"""Revisions and ids as terminal text."""

from __future__ import annotations

from serve_app.client.terminal_text import PALETTE, RevisionCell, revision_style, short_ids


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


def test_short_ids_are_as_short_as_their_differences_allow() -> None:
    assert short_ids(["app#Model#abcdefgh", "app#Model#xyzxyzxyz"]) == {
        "app#Model#abcdefgh": "abcdef",
        "app#Model#xyzxyzxyz": "xyzxyz",
    }
    assert list(short_ids(["Model#abcdef1x", "Model#abcdef2x"]).values()) == ["abcdef1", "abcdef2"]
    assert list(short_ids(["a#same", "b#same"]).values()) == ["a#same", "b#same"]
    assert short_ids([]) == {}
