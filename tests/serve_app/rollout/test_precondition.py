"""Preconditions of user requests."""

from __future__ import annotations

from serve_app.rollout.precondition import ALWAYS, Precondition


def test_a_key_is_scoped_to_one_request() -> None:
    given = Precondition(expected_generation=3, key="k")
    assert given.scoped("promote r1") == Precondition(expected_generation=3, key="promote r1 k")
    assert ALWAYS.scoped("promote r1") == ALWAYS


def test_its_arguments_make_the_same_precondition_again() -> None:
    for given in (ALWAYS, Precondition(key="k"), Precondition(expected_generation=0, key="k")):
        assert Precondition(**given.args()) == given
    assert ALWAYS.args() == {}
