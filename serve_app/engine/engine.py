"""What every engine is: a gate, the revisions that it answers with, and turns at the weights.

A request comes in through `admit`, which decides once on which revision it runs; whatever changes
afterwards, it stays there to its last token. There is one default revision, for everybody who names
none, and any number beside it. An engine differs from another in how it runs requests:
`serve_app.engine.causal` generates with continuous batching in lanes, `serve_app.engine.batching` runs batches.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

from hotswap_lib import CompileGuard, Revision, Slot, Staged
from serve_app.engine.admission import Admission
from serve_app.engine.request_recorder import RequestRecorder
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.steps import Cutover, GenerationOutput
from serve_app.engine.weight_lock import WeightLock
from serve_app.rollout.plan import InFlight
from serve_app.rollout.state import Traffic
from serve_app.rollout.traffic_split import TrafficSplit
from serve_app.settings import Settings
from serve_app.wire.admin import LaneView
from serve_app.wire.errors import (
    DeadlineExceeded,
    EngineStopped,
    GenerationFailed,
    RevisionNotServed,
)
from serve_app.wire.request_stats import PROBE

T = TypeVar("T")


class Engine(ABC):
    """One slot, one gate. For one event loop."""

    compiled_regions = 0
    scores_texts = False  # whether `Sampling.forced` is done

    def __init__(self, slot: Slot, settings: Settings) -> None:
        self.slot = slot
        self.settings = settings
        self.admission = Admission()
        self.guard = CompileGuard()
        self.weight_lock = WeightLock(slot)
        self.default = slot.revision
        self.traffic: Traffic | None = None
        self.recorder = RequestRecorder()
        self._split = TrafficSplit(start=random.random())
        self._beside: set[Revision] = set()
        self._running: Counter[Revision] = Counter()
        self._proving: Counter[Revision] = Counter()
        self._releasing: set[asyncio.Task[None]] = set()

    # ---- what an engine must do ---------------------------------------------------------------

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @property
    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    async def warm_up(self) -> float:
        """Run every shape class that a request can meet, then arm the guard. Returns seconds."""

    @abstractmethod
    def lanes(self) -> tuple[LaneView, ...]:
        """Which revisions run here, and how many requests each."""

    def generate(
        self,
        ticket: Ticket,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stream: bool,
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Behind `Ticket.generate`, for engines that generate text."""
        raise NotImplementedError

    def ended_by_itself(self, token_ids: list[int]) -> bool:
        """Whether the last token is one that ends an answer."""
        raise NotImplementedError

    async def _make_room(self, revision: Revision) -> None:  # noqa: B027  # most need nothing
        """Before new requests go to `revision` while older ones still run elsewhere."""

    async def _take_seat(self, revision: Revision) -> int:  # noqa: ARG002
        """Where a request on `revision` runs; may wait. Pairs with `_leave_seat`."""
        return 0

    def _leave_seat(self, seat: int) -> None:  # noqa: B027
        """The request is out of the engine."""

    # ---- requests -----------------------------------------------------------------------------

    @property
    def serves(self) -> tuple[Revision, ...]:
        """The default revision, then those beside it."""
        return self.default, *sorted(self._beside - {self.default}, key=str)

    @asynccontextmanager
    async def admit(
        self, pin: str | None = None, session: str | None = None
    ) -> AsyncIterator[Ticket]:
        """Wait at the gate, then run on one revision to the end, whatever changes meanwhile.

        Args:
            pin: the revision that the request names (`name`, `name@digest8` or in full).
            session: what the request belongs to; all of a session get the same revision, as long
                as a canary's share does not grow. Those of `PROBE` do not count in the recorder.

        Raises:
            RevisionNotServed: nobody has brought that one here.
            LanesTaken: no lane is free for it, and `lane_overflow` says not to wait.
            DeadlineExceeded: it was not finished after `request_timeout_s`.
        """
        deadline = asyncio.timeout(self.settings.request_timeout_s)
        arrived, ticket = time.perf_counter(), None
        step_id = None if session == PROBE else self.recorder.step_id
        try:
            async with deadline:
                await self.admission.enter()
                try:
                    revision = self._chosen(session) if pin is None else self._named(pin)
                    self._running[revision] += 1
                    ticket = Ticket(self, revision)
                    ticket.seat = await self._take_seat(revision)
                    yield ticket
                finally:
                    self._release(ticket)
        except TimeoutError:
            if not deadline.expired():
                raise
            self._write(ticket, step_id, arrived, chosen=pin is None, failed=True)
            raise DeadlineExceeded(self.settings.request_timeout_s) from None
        except (GenerationFailed, EngineStopped):
            self._write(ticket, step_id, arrived, chosen=pin is None, failed=True)
            raise
        else:
            self._write(ticket, step_id, arrived, chosen=pin is None, failed=False)

    def _write(
        self,
        ticket: Ticket | None,
        step_id: str | None,
        arrived: float,
        *,
        chosen: bool,
        failed: bool,
    ) -> None:
        """Into the recorder. Who was refused, or went away, says nothing about a revision."""
        if ticket is None:
            return
        self.recorder.write(
            ticket.revision.key,
            step_id=step_id,
            chosen=chosen,
            failed=failed,
            latency_s=time.perf_counter() - arrived,
            first_token_s=None if ticket.first_at is None else ticket.first_at - arrived,
            tokens=ticket.tokens,
        )

    def _chosen(self, session: str | None) -> Revision:
        """For a request that names none: the default, or the canary where it has a share of it."""
        now = self.traffic
        if now is None or now.placement == "dedicated":
            return self.default
        for revision in self._beside:
            if revision.key == now.canary:
                return revision if self._split.to_canary(now, session) else self.default
        return self.default

    def go_by(self, traffic: Traffic | None) -> None:
        """From the next request on. What is measured begins anew with every step_id."""
        self.traffic = traffic
        self.recorder.open(None if traffic is None else traffic.step_id)

    def _named(self, pin: str | None) -> Revision:
        if pin is None:
            return self.default
        # beside first: a name alone means what was loaded under it, also when a default has it too
        for revision in (*sorted(self._beside, key=str), self.default):
            if revision.matches(pin):
                return revision
        raise RevisionNotServed(pin, tuple(map(str, self.serves)))

    def _release(self, ticket: Ticket | None) -> None:
        """Out of the gate, once the engine has let go of everything the ticket started."""
        if ticket is None:
            self.admission.leave()
        elif not ticket.leaving:
            self._released(ticket)
        else:
            task = asyncio.create_task(self._release_later(ticket))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _release_later(self, ticket: Ticket) -> None:
        await asyncio.wait(ticket.leaving)
        self._released(ticket)

    def _released(self, ticket: Ticket) -> None:
        if ticket.seat is not None:
            self._leave_seat(ticket.seat)
        self._running[ticket.revision] -= 1
        self._forget_unused(ticket.revision)
        self.admission.leave()

    # ---- revisions ----------------------------------------------------------------------------

    async def cut_over(self, staged: Staged, *, in_flight: InFlight) -> Cutover:
        """Make a staged image the default revision: committed, verified, then admitted to.

        `drain`: nobody new comes in until everybody has left. `overlap`: requests that run finish
        on their revision, beside the new ones.

        Raises:
            DrainTimeout: requests still ran after `drain_timeout_s`; all is as before.
            VerifyFailed: the weights did not take the image; all is as before.
        """
        began = time.monotonic()
        if in_flight == "overlap":
            with self._arriving(staged):
                await self._make_room(staged.revision)
                return await self._switch(staged, drained_s=0.0)
        async with self.admission.drained(timeout_s=self.settings.drain_timeout_s):
            with self._arriving(staged):
                return await self._switch(staged, drained_s=time.monotonic() - began)

    async def _switch(self, staged: Staged, *, drained_s: float) -> Cutover:
        receipt, verify_s = await _finished(
            asyncio.to_thread(self.weight_lock.commit_and_verify, staged.revision)
        )
        before, self.default = self.default, staged.revision
        self._forget_unused(before)
        return Cutover(receipt=receipt, drain_ms=drained_s * 1e3, verify_ms=verify_s * 1e3)

    async def hold(self, staged: Staged) -> None:
        """Answer with this revision too, when a request names it. Raises `VerifyFailed`."""
        with self._arriving(staged):
            await _finished(asyncio.to_thread(self.weight_lock.commit_and_verify, staged.revision))
            self._beside.add(staged.revision)

    def drop(self, revision: Revision) -> None:
        """Admit nobody to it by name any more; requests that run on it finish."""
        self._beside.discard(revision)
        self._forget_unused(revision)

    @contextmanager
    def _arriving(self, staged: Staged) -> Iterator[None]:
        """Here while it is proved, although older requests on the same revision may end now."""
        self._proving[staged.revision] += 1
        self.weight_lock.add(staged)
        try:
            yield
        finally:
            self._proving -= Counter([staged.revision])
            self._forget_unused(staged.revision)

    def _forget_unused(self, revision: Revision) -> None:
        held = revision == self.default or revision in self._beside or revision in self._proving
        if not held and self._running[revision] <= 0:
            del self._running[revision]
            self.weight_lock.drop(revision)
            self._forgotten(revision)

    def _forgotten(self, revision: Revision) -> None:  # noqa: B027
        """The engine's own memory of it can go."""


class Ticket:
    """One admitted request, and its one revision."""

    def __init__(self, engine: Engine, revision: Revision) -> None:
        self.revision = revision
        self.seat: int | None = None
        self.tokens = 0  # of all its generations
        self.first_at: float | None = None  # the first token of any, on perf_counter's clock
        self.leaving: set[asyncio.Task[None]] = set()  # what it cancelled and the engine still has
        self._engine = engine

    def heard(self, step: GenerationOutput, *, new: int) -> None:
        """A generation has `new` tokens more."""
        self.tokens += new
        if step.first_at is not None:
            self.first_at = min(step.first_at, self.first_at or step.first_at)

    def generate(
        self, prompt_ids: list[int], *, max_tokens: int, sampling: SamplingParams, stream: bool
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Steps of one generation; only the finished one unless `stream`.

        Leaving the iterator early cancels the generation.

        Raises:
            GenerationFailed: the model could not run it.
            EngineStopped: no thread is there to generate.
        """
        return self._engine.generate(
            self, prompt_ids, max_tokens=max_tokens, sampling=sampling, stream=stream
        )


async def _finished(work: Awaitable[T]) -> T:
    """The result of `work`, waited for also when the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # however often it is cancelled
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise
