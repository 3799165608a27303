"""Stop strings: the text ends before them, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.openai.stop_strings import StopStrings

FEW = st.text(alphabet="ab", max_size=30)  # so that stop strings do occur


def through(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    gate = StopStrings(stops)
    text = "".join(gate.feed(piece) for piece in pieces)
    return text + gate.rest(), gate.found


def by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


@given(
    pieces=st.lists(FEW), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4)
)
def test_it_does_not_matter_how_a_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    assert through(pieces, stops) == by_definition("".join(pieces), stops)


@given(pieces=st.lists(FEW), stop=st.text(alphabet="ab", min_size=1, max_size=6))
def test_no_more_is_held_back_than_the_start_of_a_stop_string(pieces: list[str], stop: str) -> None:
    gate = StopStrings([stop])
    seen = said = ""
    for piece in pieces:
        seen, said = seen + piece, said + gate.feed(piece)
        held = seen.removeprefix(said)
        if not gate.found:
            assert stop.startswith(held)
            assert not any(seen.endswith(stop[:more]) for more in range(len(held) + 1, len(stop)))


def test_nothing_follows_a_stop_string() -> None:
    gate = StopStrings(["END"])
    assert gate.feed("one END two") == "one "
    assert (gate.feed("three"), gate.rest(), gate.found) == ("", "", True)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["\n\n"], "a\n\n\nb"),
        (["bc", "abcd"], "xabcd"),  # the first to be complete, not the first to begin
        (["c", "abc"], "xabc"),  # complete at once: the longer
        (["é🦜"], "aé🦜b"),
        (["aab"], "aaab"),
    ],
)
def test_a_text_ends_before_the_string_that_is_complete_first(stops: list[str], text: str) -> None:
    assert through(list(text), stops) == by_definition(text, stops)
    assert through(list(text), stops)[1]


def test_a_long_text_that_nearly_stops_all_the_time_costs_a_look_at_each_character() -> None:
    text, stop = "a" * 200_000, "a" * 1000 + "b"
    gate = StopStrings([stop])
    assert gate.feed(text) + gate.rest() == text
