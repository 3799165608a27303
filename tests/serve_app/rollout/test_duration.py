"""Lengths of time as people write them."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter, ValidationError

from serve_app.rollout.duration import Duration

DURATION: TypeAdapter[float] = TypeAdapter(Duration)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90.0),
        ("1.5m", 90.0),
        ("500ms", 0.5),
        ("2h", 7200.0),
        ("1d", 86_400.0),
        (" 3 s ", 3.0),
        (2, 2.0),
        (0.25, 0.25),
    ],
)
def test_a_length_of_time_is_seconds_however_it_is_written(text: object, seconds: float) -> None:
    assert DURATION.validate_python(text) == seconds


@pytest.mark.parametrize("text", ["30", "", "s", "-1s", "1.s", "1e3s", "2 weeks", "1m30s", "1S"])
def test_text_without_a_number_and_one_unit_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(
        ValidationError, match="is not a duration: write a number with one of ms, s"
    ):
        DURATION.validate_python(text)


@pytest.mark.parametrize("good", [3, 0.5, "90s", " 1.5 m "])
def test_the_schema_takes_numbers_and_text_with_a_unit(good: Any) -> None:
    jsonschema.validate(good, DURATION.json_schema())


@pytest.mark.parametrize("bad", ["90", "manual", "s", None])
def test_the_schema_takes_no_other_text(bad: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, DURATION.json_schema())
