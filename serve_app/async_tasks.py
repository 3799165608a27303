"""Asyncio tasks whose result is not awaited."""

from __future__ import annotations

import asyncio
from typing import Any


def retrieve_exception(task: asyncio.Future[Any]) -> None:
    """A done callback that marks the exception as retrieved, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()
