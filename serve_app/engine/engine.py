"""Engine and Ticket: admit requests, each on one revision, and change the revisions meanwhile.

`Engine.admit` decides once on which revision a request runs. Whatever changes afterwards, the
request stays on that revision to its last token. Engines differ in how they run requests:
`serve_app.engine.causal` generates text with continuous batching in lanes,
`serve_app.engine.batching` is the base of those that run fixed batches.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from hotswap_lib import CompileGuard, Revision, Slot, Staged
from serve_app.engine.admission import Admission
from serve_app.engine.request_recorder import Recording, RequestRecorder
from serve_app.engine.revisions import Revisions
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.steps import Cutover, GenerationOutput
from serve_app.engine.weight_lock import WeightLock
from serve_app.rollout.plan import InFlight
from serve_app.rollout.state import Traffic
from serve_app.settings import Settings
from serve_app.wire.admin import LaneView
from serve_app.wire.errors import DeadlineExceeded
from serve_app.wire.request_stats import PROBE


class Engine(ABC):
    """Runs requests on the revisions of one slot. For one event loop.

    Attributes:
        compiled_regions: how many parts of the model are compiled.
        scores_texts: True if `SamplingParams.forced` is supported.
        guard: counts compilations after the warm-up.
        traffic: the current traffic split between the default revision and a canary.
        recorder: the request statistics of the current canary step.
    """

    compiled_regions = 0
    scores_texts = False

    def __init__(self, slot: Slot, settings: Settings) -> None:
        self.slot = slot
        self.settings = settings
        self.admission = Admission()
        self.guard = CompileGuard()
        self.weight_lock = WeightLock(slot)
        self.revisions = Revisions(self.weight_lock, self._on_removed)
        self.traffic: Traffic | None = None
        self.recorder = RequestRecorder()
        self._leaving: set[asyncio.Task[None]] = set()

    # ---- for subclasses -----------------------------------------------------------------------

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @property
    @abstractmethod
    def alive(self) -> bool:
        """False after `stop()` or after a thread of the engine has died."""

    @abstractmethod
    async def warm_up(self) -> float:
        """Runs every shape class that a request can meet, then arms the guard. Returns seconds."""

    @abstractmethod
    def lanes(self) -> tuple[LaneView, ...]:
        """The revisions that run here, and the number of requests of each."""

    def generate(
        self,
        ticket: Ticket,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stream: bool,
    ) -> AsyncGenerator[GenerationOutput, None]:
        """See `Ticket.generate`. Only for engines that generate text."""
        raise NotImplementedError

    def ended_by_itself(self, token_ids: list[int]) -> bool:
        """True if the last token is an end token. Only for engines that generate text."""
        raise NotImplementedError

    async def _reserve_lane(self, revision: Revision) -> None:  # noqa: B027  # most have none
        """Prepares for requests on `revision` while requests on others still run."""

    async def _enter_lane(self, revision: Revision) -> int:  # noqa: ARG002
        """The lane of a request on `revision`; may wait. Pairs with `_leave_lane`."""
        return 0

    def _leave_lane(self, lane: int) -> None:  # noqa: B027
        """No step of the engine contains the request any more."""

    def _on_removed(self, revision: Revision) -> None:  # noqa: B027
        """Called after the image of a revision was removed."""

    # ---- requests -----------------------------------------------------------------------------

    @property
    def default(self) -> Revision:
        """The revision of requests that name none."""
        return self.revisions.default

    @property
    def serves(self) -> tuple[Revision, ...]:
        """The default revision, then the loaded adapters."""
        return self.revisions.served

    @asynccontextmanager
    async def admit(
        self, pin: str | None = None, session: str | None = None
    ) -> AsyncIterator[Ticket]:
        """Waits for admission, then runs on one revision to the end, whatever changes meanwhile.

        Args:
            pin: the revision that the request names (`name`, `name@digest8` or in full).
            session: all requests of a session get the same revision while the traffic weight of
                a canary does not grow. Requests of the session `PROBE` are not recorded.

        Raises:
            RevisionNotServed: no served revision matches `pin`.
            LanesTaken: all lanes are busy, and `lane_overflow` is `refuse`.
            DeadlineExceeded: it did not finish within `request_timeout_s`.
        """
        step_id = None if session == PROBE else self.recorder.step_id
        with self.recorder.request(step_id) as recording:
            deadline = asyncio.timeout(self.settings.request_timeout_s)
            try:
                async with deadline, self._admitted(pin, session, recording) as ticket:
                    yield ticket
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise DeadlineExceeded(self.settings.request_timeout_s) from None

    @asynccontextmanager
    async def _admitted(
        self, pin: str | None, session: str | None, recording: Recording
    ) -> AsyncIterator[Ticket]:
        await self.admission.enter()
        ticket = None
        try:
            if pin is None:
                revision = self.revisions.choose(self.traffic, session)
            else:
                revision = self.revisions.named(pin)
            self.revisions.request_started(revision)
            recording.revision, recording.chosen = revision.key, pin is None
            ticket = Ticket(self, revision, recording)
            ticket.lane = await self._enter_lane(revision)
            yield ticket
        finally:
            self._release(ticket)

    def _release(self, ticket: Ticket | None) -> None:
        """Counts the request as ended, as soon as no step can contain any of its generations."""
        if ticket is None:
            self.admission.leave()
        elif not ticket.cancelling:
            self._ended(ticket)
        else:
            task = asyncio.create_task(self._release_later(ticket))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _release_later(self, ticket: Ticket) -> None:
        await asyncio.wait(ticket.cancelling)
        self._ended(ticket)

    def _ended(self, ticket: Ticket) -> None:
        if ticket.lane is not None:
            self._leave_lane(ticket.lane)
        self.revisions.request_ended(ticket.revision)
        self.admission.leave()

    # ---- revisions ----------------------------------------------------------------------------

    def apply_traffic(self, traffic: Traffic | None) -> None:
        """Applies the traffic split to new requests.

        Request statistics are reset at each canary step.
        """
        self.traffic = traffic
        self.recorder.start_step(None if traffic is None else traffic.step_id)

    async def cut_over(self, staged: Staged, *, in_flight: InFlight) -> Cutover:
        """Makes a staged image the default revision: committed and verified before any request.

        `drain`: new requests wait until all running ones have ended. `overlap`: running requests
        finish on their revision while new ones start on this one.

        Raises:
            DrainTimeout: requests still ran after `drain_timeout_s`; nothing has changed.
            VerifyFailed: the weights did not take the image; nothing has changed.
        """
        began = time.monotonic()
        if in_flight == "overlap":
            with self.revisions.verifying(staged):
                await self._reserve_lane(staged.revision)
                receipt, verify_s = await self.revisions.make_default(staged)
            return Cutover(receipt=receipt, drain_ms=0.0, verify_ms=verify_s * 1e3)
        async with self.admission.drained(timeout_s=self.settings.drain_timeout_s):
            drain_ms = (time.monotonic() - began) * 1e3
            receipt, verify_s = await self.revisions.make_default(staged)
            return Cutover(receipt=receipt, drain_ms=drain_ms, verify_ms=verify_s * 1e3)

    async def add(self, staged: Staged) -> None:
        """Serves this revision too, to requests that name it. Raises `VerifyFailed`."""
        await self.revisions.add(staged)

    def remove(self, revision: Revision) -> None:
        """Stops serving it to requests that name it. Requests that run on it finish."""
        self.revisions.remove(revision)


class Ticket:
    """One admitted request. All its generations run on `revision`.

    Attributes:
        lane: the lane that it runs in, once it has one.
        cancelling: tasks that wait until the engine has let go of cancelled generations.
    """

    def __init__(self, engine: Engine, revision: Revision, recording: Recording) -> None:
        self.revision = revision
        self.lane: int | None = None
        self.cancelling: set[asyncio.Task[None]] = set()
        self._recording = recording
        self._engine = engine

    @property
    def tokens(self) -> int:
        """Generated so far, by all its generations."""
        return self._recording.tokens

    @property
    def first_at(self) -> float | None:
        """Time of the first token of any generation, on `time.perf_counter`'s clock."""
        return self._recording.first_at

    def record(self, output: GenerationOutput, *, new_tokens: int) -> None:
        """Counts the new tokens of one of its generations."""
        self._recording.add(new_tokens, output.first_at)

    def generate(
        self, prompt_ids: list[int], *, max_tokens: int, sampling: SamplingParams, stream: bool
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Outputs of one generation; only the finished one unless `stream`.

        Leaving the iterator early cancels the generation.

        Raises:
            GenerationFailed: the model could not run it.
            EngineStopped: the engine's thread has stopped.
        """
        return self._engine.generate(
            self, prompt_ids, max_tokens=max_tokens, sampling=sampling, stream=stream
        )
