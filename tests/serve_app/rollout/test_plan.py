"""The plan: what a user may ask for, and why what cannot work is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from serve_app.rollout.plan import CanaryStep, Plan

DOCS = Path(__file__).parents[3] / "docs" / "rollouts.md"
TEN_THEN_HALF = [{"weight": 10, "hold": "2m"}, {"weight": 50, "hold": "manual"}]


def canary(**fields: Any) -> Plan:
    given = {"adapter": "org/pirate", "strategy": "canary", "steps": TEN_THEN_HALF}
    return Plan.model_validate(given | fields)


def example() -> Any:
    found = re.search(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def test_an_adapter_alone_is_a_rolling_plan_of_one_replica_at_a_time() -> None:
    plan = Plan(adapter="org/pirate")
    assert (plan.strategy, plan.max_unavailable, plan.progress_deadline) == ("rolling", 1, 600.0)
    assert (plan.name, plan.in_flight, plan.placement, plan.analysis) == (None, None, None, None)
    assert (plan.steps, plan.on_failure, plan.history_limit) == ((), "rollback", 20)


def test_spaces_around_the_adapter_are_not_part_of_it() -> None:
    assert Plan.model_validate({"adapter": "  org/pirate\n"}).adapter == "org/pirate"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter", ""),
        ("adapter", "   "),
        ("strategy", "blue-green"),
        ("in_flight", "pause"),
        ("placement", "everywhere"),
        ("on_failure", "shrug"),
        ("max_unavailable", 0),
        ("max_unavailable", 1.5),
        ("progress_deadline", 0),
        ("progress_deadline", 2_592_001),
        ("progress_deadline", float("nan")),
        ("progress_deadline", "10"),
        ("history_limit", 0),
        ("history_limit", 1001),
        ("weight", 5),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_the_name_of_its_field(
    field: str, value: object
) -> None:
    with pytest.raises(ValidationError) as refused:
        Plan.model_validate({"adapter": "org/pirate", field: value})
    assert [error["loc"] for error in refused.value.errors()] == [(field,)]


@pytest.mark.parametrize("strategy", ["rolling", "all_at_once"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", TEN_THEN_HALF),
        ("placement", "shared"),
        ("analysis", {"checks": [{"metric": "error_rate", "max": 0}]}),
    ],
)
def test_what_belongs_to_a_canary_is_refused_without_one(
    strategy: str, field: str, value: object
) -> None:
    with pytest.raises(ValidationError, match=f"{field} is for strategy 'canary', not '{strategy}"):
        Plan.model_validate({"adapter": "org/pirate", "strategy": strategy, field: value})


def test_a_canary_without_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="a canary needs steps, such as"):
        canary(steps=[])


@pytest.mark.parametrize("second", [10, 9.5])
def test_weights_that_do_not_grow_are_refused(second: float) -> None:
    why = f"the weights of the steps have to grow: {second:g} % comes after 10 %"
    with pytest.raises(ValidationError, match=why):
        canary(steps=[{"weight": 10}, {"weight": second}])


@pytest.mark.parametrize(
    ("step", "field"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": -1}, "weight"),
        ({"weight": 101}, "weight"),
        ({"hold": "1m"}, "weight"),
        ({"weight": 5, "hold": -1}, "hold"),
        ({"weight": 5, "hold": "31d"}, "hold"),
        ({"weight": 5, "hold": "for ever"}, "hold"),
        ({"weight": 5, "pause": "1m"}, "pause"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(step: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        canary(steps=[step])
    assert {error["loc"][:3] for error in refused.value.errors()} == {("steps", 0, field)}


def test_more_steps_than_any_plan_needs_are_refused() -> None:
    with pytest.raises(ValidationError, match="at most 100 items"):
        canary(steps=[{"weight": (number + 1) / 2} for number in range(101)])


@pytest.mark.parametrize(
    ("hold", "seconds"), [("90s", 90.0), ("1.5m", 90.0), (3, 3.0), ("manual", 0.0)]
)
def test_a_step_is_held_for_a_time_or_until_a_user_promotes_it(hold: Any, seconds: float) -> None:
    assert CanaryStep(weight=5, hold=hold).hold_s == seconds


def test_a_plan_never_changes_after_it_was_accepted() -> None:
    plan = Plan(adapter="org/pirate")
    with pytest.raises(ValidationError, match="frozen"):
        plan.strategy = "all_at_once"


def test_a_plan_is_the_same_after_it_was_written_down() -> None:
    plan = Plan.model_validate(example())
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_plan_in_the_documentation_is_one_and_its_schema_agrees() -> None:
    plan = Plan.model_validate(example())
    assert [step.weight for step in plan.steps] == [10, 50]
    assert plan.analysis is not None
    assert len(plan.analysis.checks) == 4
    jsonschema.validate(example(), Plan.model_json_schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"adapter": 7},
        {"strategy": "blue-green"},
        {"steps": [{"weight": 0}]},
        {"steps": [{"weight": 5, "pause": "1m"}]},
        {"max_unavailable": 0},
        {"analysis": {"checks": [{"metric": "cost", "max": 1}]}},
        {"surprise": True},
    ],
)
def test_the_schema_refuses_what_the_plan_would_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(example() | wrong, Plan.model_json_schema())
