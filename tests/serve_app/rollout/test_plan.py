"""The plan: what a user may ask for."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve_app.rollout.plan import Plan


def test_an_adapter_alone_is_a_rolling_plan_of_one_replica_at_a_time() -> None:
    plan = Plan(adapter="org/pirate")
    assert (plan.strategy, plan.max_unavailable, plan.progress_deadline_s) == ("rolling", 1, 600.0)
    assert (plan.name, plan.in_flight) == (None, None)


def test_spaces_around_the_adapter_are_not_part_of_it() -> None:
    assert Plan.model_validate({"adapter": "  org/pirate\n"}).adapter == "org/pirate"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter", ""),
        ("adapter", "   "),
        ("strategy", "canary"),
        ("in_flight", "pause"),
        ("max_unavailable", 0),
        ("max_unavailable", 1.5),
        ("progress_deadline_s", 0),
        ("progress_deadline_s", 86_401),
        ("progress_deadline_s", float("nan")),
        ("weight", 5),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_the_name_of_its_field(
    field: str, value: object
) -> None:
    with pytest.raises(ValidationError) as refused:
        Plan.model_validate({"adapter": "org/pirate", field: value})
    assert [error["loc"] for error in refused.value.errors()] == [(field,)]


def test_a_plan_never_changes_after_it_was_accepted() -> None:
    plan = Plan(adapter="org/pirate")
    with pytest.raises(ValidationError, match="frozen"):
        plan.strategy = "all_at_once"
