"""What is used of Ray although Ray does not document it."""

from __future__ import annotations

from ray.exceptions import RayTaskError

from serve_app.wire.errors import PlanImpossible
from serve_app.wire.ray_internals import cause_of


def test_the_cause_of_a_task_error_is_the_exception_of_the_task() -> None:
    raised = PlanImpossible("no")
    error = RayTaskError(function_name="f", traceback_str="Traceback ...", cause=raised)
    assert cause_of(error) is raised, "Ray keeps the exception somewhere else: see cause_of"


def test_another_error_is_its_own_cause() -> None:
    error = ValueError("x")
    assert cause_of(error) is error
