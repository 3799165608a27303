"""Makes the engine serve what the desired state says: fetch, stage, cut over, load, unload.

The steps run in this order. The default revision comes first: an abort must not wait for an image
that only other revisions need. Then come the other loaded adapters; one that fails is reported and
does not stop the rest. The target of a rollout is staged last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ray.exceptions import ObjectLostError

from hotswap_lib import Revision
from serve_app.engine.engine import Engine
from serve_app.engine.steps import Cutover
from serve_app.replica.staging import StagedImage, Staging
from serve_app.rollout.state import Desired, Failure
from serve_app.wire.admin import SwapView
from serve_app.wire.ray_internals import cause_of
from serve_app.wire.reports import Answer

logger = logging.getLogger(__name__)
_RETRY_S = 0.2


class Reconciler:
    """Applies one desired state after the other. At most one task works at a time.

    Attributes:
        ready: done once the first assigned revision is live and every other adapter of that desired
            state is loaded or has failed. Fails if the replica cannot serve anything.
        acting_on: the newest desired state. None before the first one, and after an image was lost,
            so that the controller sends it again.
        failure: why the default revision or the target of a rollout could not be brought.
        refused: the other adapters that could not be loaded, by revision key.
        last_swap: the times of the last cutover.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        label: str,
        patience_s: float,
        on_change: Callable[[], None],
    ) -> None:
        """`label`: the replica in log messages.

        `patience_s`: an adapter has failed if its image takes longer than this.

        `on_change` is called whenever the state of the replica has changed.
        """
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.acting_on: Desired | None = None
        self.failure: Failure | None = None
        self.refused: dict[str, Failure] = {}
        self.last_swap: SwapView | None = None
        self._engine = engine
        self._label = label
        self._patience_s = patience_s
        self._on_change = on_change
        self._answer = Answer()
        self._staging = Staging(engine.slot)
        self._cutting_over: tuple[str, str] | None = None  # (revision, in_flight)
        self._work: asyncio.Task[None] | None = None

    @property
    def staged(self) -> Revision | None:
        """The target of a rollout, once its image is staged."""
        want = self._answer.desired
        if want is None or want.stage in (None, self._engine.default.key):
            return None
        return self._staging.revision(str(want.stage))

    async def apply(self, desired: Desired, answer: Answer) -> None:
        """Starts to apply `desired`, with the images of `answer`. Does not wait for the result."""
        # a drain that starts over would let requests in again, and so might never end
        if self._cutting_over != (desired.hold, desired.in_flight):
            await self.stop()
        self.acting_on, self._answer = desired, answer
        self._engine.apply_traffic(desired.traffic)
        self.refused.clear()  # those that are still wanted are tried again now
        if self._work is None:
            self._work = asyncio.create_task(self._reconcile())

    async def stop(self) -> None:
        if self._work is not None and not self._work.done():
            self._work.cancel()
            await asyncio.wait([self._work])
        self._work = None

    async def close(self) -> None:
        await self.stop()
        await self._staging.close()

    # ---- steps ------------------------------------------------------------------------------

    @property
    def _want(self) -> Desired:
        assert self._answer.desired is not None
        return self._answer.desired

    async def _reconcile(self) -> None:
        try:
            self._free_images()
            held = await self._run_step(self._cut_over, self._want.hold)
            want = self._want  # a newer one may have come during the cutover
            if held:
                self._engine.admission.open()
                self.failure = None
            self._free_images()
            await self._load_adapters(want)
            if held and not self.ready.done():
                self.ready.set_result(None)
            # also without a default revision: this may be the rollout that brings one
            if want.stage not in (None, want.hold):
                self._on_change()
                await self._run_step(self._stage_target, str(want.stage))
        finally:
            self._on_change()

    def _free_images(self) -> None:
        want = self._want
        names = {self._engine.default.key, want.hold, want.stage, *want.also_serves} - {None}
        self._staging.keep_only({str(name) for name in names})

    async def _run_step(self, step: Callable[[str], Awaitable[None]], name: str) -> bool:
        """Returns True if the step succeeded. Otherwise the next report has the reason."""
        try:
            await step(name)
        except ObjectLostError as error:
            self._warn(name, f"its image was lost ({first_line(error)}); requesting it again")
            await asyncio.sleep(_RETRY_S)
            self.acting_on = None
        except Exception as error:  # without a report the controller would wait for its deadline
            self._warn(name, first_line(error))
            self.failure = self._failure_of(name, first_line(error))
            # nothing to serve, and no rollout under way that would bring something
            if not self.ready.done() and self._want.stage is None:
                self.ready.set_exception(error)
        else:
            return True
        return False

    async def _cut_over(self, name: str) -> None:
        """Makes `name` the default revision."""
        before = self._engine.default
        if before.key == name:
            return
        image = await self._staging.get(name, self._answer)
        if before.key in self._want.also_serves:
            # loaded before it stops being the default, so that it is served without a gap
            await self._load_adapter(before.key)
        self._on_change()  # requests for the default wait from here on
        self._cutting_over = name, self._want.in_flight
        try:
            cutover = await self._engine.cut_over(image.staged, in_flight=self._want.in_flight)
        finally:
            self._cutting_over = None
        self.last_swap = _swap_view(image, cutover, in_flight=self._want.in_flight)
        after, commit_us = cutover.receipt.revision, cutover.receipt.commit_us
        logger.info(
            f"{self._label}: swapped {before} -> {after} in {commit_us:.0f} us",
            extra={"revision": str(after)},
        )

    async def _stage_target(self, name: str) -> None:
        """Stages the target of a rollout next to the live weights."""
        await self._staging.get(name, self._answer)

    async def _load_adapters(self, want: Desired) -> None:
        loaded = {revision.key for revision in self._engine.serves}
        missing = [name for name in want.also_serves if name not in loaded]
        if missing:
            self._on_change()  # the default is in service, whether or not these load
        async with asyncio.TaskGroup() as group:  # concurrently: one slow image delays no other
            for name in missing:
                group.create_task(self._load_adapter(name))
        # unload last: an adapter that replaces another of the same name leaves no gap
        for revision in self._engine.serves[1:]:
            if revision.key not in want.also_serves:
                self._engine.remove(revision)

    async def _load_adapter(self, name: str) -> None:
        """Loads one adapter. If it fails, the reason is reported and nothing else changes."""
        try:
            async with asyncio.timeout(self._patience_s):
                image = await self._staging.get(name, self._answer)
            await self._engine.add(image.staged)
        except TimeoutError:
            self._refuse(name, f"its image did not come within {self._patience_s:g} s")
        except Exception as error:  # without a report the controller would wait for its deadline
            self._refuse(name, first_line(error))

    def _refuse(self, name: str, reason: str) -> None:
        self._warn(name, reason)
        self.refused[name] = self._failure_of(name, reason)
        self._staging.forget(name)

    def _failure_of(self, name: str, reason: str) -> Failure:
        return Failure(revision=name, reason=reason, generation=self._want.generation)

    def _warn(self, name: str, reason: str) -> None:
        revision = str(Revision.parse(name))
        logger.warning(f"{self._label}: {revision}: {reason}", extra={"revision": revision})


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; of a remote error, of its cause."""
    lines = str(cause_of(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def _swap_view(image: StagedImage, cutover: Cutover, *, in_flight: str) -> SwapView:
    receipt = cutover.receipt
    return SwapView(
        revision=str(receipt.revision),
        in_flight=in_flight,
        fetch_ms=image.fetch_ms,
        stage_ms=image.stage_ms,
        drain_ms=cutover.drain_ms,
        commit_us=receipt.commit_us,
        verify_ms=cutover.verify_ms,
        copies=receipt.copies,
        image_bytes=receipt.image_bytes,
    )
