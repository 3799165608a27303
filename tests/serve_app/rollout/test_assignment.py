"""The rule about waves, one row for each thing that it has to weigh."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.rollout.assignment import next_wave

REPLICAS = ("r1", "r2", "r3", "r4")


def wave(**changed: Any) -> list[str]:
    """The next wave to "new" of four healthy replicas on "old", all of them ready."""
    given: dict[str, Any] = {
        "target": "new",
        "assigned": dict.fromkeys(REPLICAS, "old"),
        "in_service": set(REPLICAS),
        "broken": set(),
        "ready": set(REPLICAS),
        "max_unavailable": 1,
        "keep_one": True,
    }
    return next_wave(**given | changed)


ROWS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("one at a time, in name order", {}, ["r1"]),
    ("as many as may be unavailable", {"max_unavailable": 2}, ["r1", "r2"]),
    ("one is kept in service", {"max_unavailable": 9}, ["r1", "r2", "r3"]),
    ("none is kept", {"max_unavailable": 9, "keep_one": False}, ["r1", "r2", "r3", "r4"]),
    ("a wave is under way", {"in_service": {"r2", "r3", "r4"}}, []),
    (
        "part of a wave is under way",
        {"in_service": {"r2", "r3", "r4"}, "ready": {"r2", "r3", "r4"}, "max_unavailable": 2},
        ["r2"],
    ),
    ("not ready, not moved", {"ready": {"r3"}}, ["r3"]),
    ("no replica is ready", {"ready": set()}, []),
    ("there already", {"assigned": dict.fromkeys(REPLICAS, "new")}, []),
    (
        "the rest",
        {"assigned": {"r1": "new", "r2": "new", "r3": "old", "r4": "new"}},
        ["r3"],
    ),
    (
        "a broken one moves for nothing, and first",
        {"in_service": {"r1", "r2", "r3"}, "broken": {"r4"}},
        ["r4"],
    ),
    (
        "all are broken",
        {"in_service": set(), "broken": set(REPLICAS)},
        ["r1", "r2", "r3", "r4"],
    ),
    (
        "the last one in service stays while another is away",
        {
            "assigned": {"r1": "old", "r2": "new"},
            "in_service": {"r1"},
            "ready": {"r1", "r2"},
            "max_unavailable": 5,
        },
        [],
    ),
    (
        "a fleet of one has no replica to keep",
        {"assigned": {"r1": "old"}, "in_service": {"r1"}, "ready": {"r1"}},
        ["r1"],
    ),
]


@pytest.mark.parametrize(("given", "expected"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS])
def test_a_wave_is_what_the_table_says(given: dict[str, Any], expected: list[str]) -> None:
    assert wave(**given) == expected


@given(
    assigned=st.dictionaries(st.sampled_from(REPLICAS), st.sampled_from(["old", "new"])),
    parts=st.lists(st.sets(st.sampled_from(REPLICAS)), min_size=3, max_size=3),
    max_unavailable=st.integers(1, 5),
)
def test_no_fleet_makes_a_wave_too_wide(
    assigned: dict[str, str], parts: list[set[str]], max_unavailable: int
) -> None:
    known = set(assigned)
    in_service, broken, ready = (part & known for part in parts)
    broken -= in_service
    moved = wave(
        assigned=assigned,
        in_service=in_service,
        broken=broken,
        ready=ready,
        max_unavailable=max_unavailable,
    )
    taken_out = set(moved) & in_service
    assert set(moved) <= ready
    assert all(assigned[replica] == "old" for replica in moved)
    assert broken & ready <= set(moved) | {r for r in known if assigned[r] == "new"}
    if taken_out:
        assert len(known - in_service) + len(taken_out) <= max_unavailable
        assert in_service - taken_out or len(known) == 1
