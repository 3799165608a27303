"""Lengths of time as people write them: `90`, `"90s"`, `"1.5m"`, `"500ms"`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")


def _seconds(given: Any) -> Any:
    """A number is seconds already; text needs a unit, because "30" could be anything."""
    if not isinstance(given, str):
        return given
    if (found := _TEXT.fullmatch(given.strip())) is None:
        units = ", ".join(_UNITS)
        raise ValueError(f"{given!r} is not a duration: write a number with one of {units}")
    return float(found[1]) * _UNITS[found[2]]


_Text = Annotated[str, Field(pattern=rf"^\s*{_TEXT.pattern}\s*$")]
Duration = Annotated[float, BeforeValidator(_seconds, json_schema_input_type=float | _Text)]
