"""Runs the probe functions of a plan (`serve_app.probes`), outside of the controller's process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayTaskError

from serve_app import probes
from serve_app.wire.ray_internals import cause_of


class Probing(Protocol):
    """Runs probe functions; in production as Ray tasks."""

    async def check(self, functions: Sequence[str]) -> None:
        """Raises `ProbeInvalid` for the first function that does not exist."""
        ...

    async def run(
        self, function: str, canary: str, stable: str, options: Mapping[str, Any]
    ) -> dict[str, float]:
        """The scores of one run. Raises what the function raises."""
        ...


class RayProbes:
    """Each probe in a Ray task of its own, with clients of the application `app`."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._check = ray.remote(num_cpus=0, max_retries=0)(probes.check)
        self._run = ray.remote(num_cpus=0, max_retries=0)(probes.run)

    async def check(self, functions: Sequence[str]) -> None:
        await _result(self._check.remote(list(functions)))

    async def run(
        self, function: str, canary: str, stable: str, options: Mapping[str, Any]
    ) -> dict[str, float]:
        task = self._run.remote(function, self._app, canary, stable, dict(options))
        try:
            return await _result(task)  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            ray.cancel(task, force=True)
            raise


async def _result(task: Any) -> Any:
    """The result of a Ray task. Raises the task's own exception."""
    try:
        return await task
    except RayTaskError as error:
        raise cause_of(error) from None
