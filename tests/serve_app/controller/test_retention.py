"""Stored adapters: deleted once no request can name them any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.controller.images import AdapterStore
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.hall import (
    Hall,
    tell,
)
from tests.serve_app.fakes import until


def test_adapters_that_no_request_can_name_any_more_are_deleted(
    world: TinyWorld, tmp_path: Path
) -> None:
    names = {revision.rpartition("@")[2]: name for revision, name in world.revisions.items()}

    def kept() -> set[str]:
        return {names[path.name[:8]] for path in (tmp_path / "adapters").iterdir()}

    async def story() -> None:
        hall = Hall(world, tmp_path)
        hall.grace_s = 0.0
        async with hall:
            await hall.replicas("r1")
            await hall.load("gamma")
            for name in ("alpha", "beta"):
                await hall.ended(await hall.roll(name, history_limit=1))
            assert kept() == {"alpha", "beta", "gamma"}
            await hall.controller.unload_adapter("gamma")
            await until(lambda: kept() == {"alpha", "beta"})
            await hall.ended(await hall.controller.undo())
            assert hall.holds() == {"alpha"}
            await hall.ended(await hall.roll("gamma", history_limit=1))
            await until(lambda: kept() == {"alpha", "gamma"})

    tell(story())


def test_an_adapter_that_cannot_be_deleted_is_no_reason_to_stop(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(AdapterStore):
        def drop(self, *_: Any, **__: Any) -> None:
            raise OSError("the bucket does not answer")

    async def story() -> None:
        hall = Hall(world, tmp_path)
        hall.grace_s = 0.0
        hall.store = Stuck
        async with hall:
            await hall.replicas("r1")
            await hall.load("gamma")
            await hall.controller.unload_adapter("gamma")
            await until(lambda: "could not delete the adapters" in caplog.text)
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())
