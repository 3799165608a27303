"""One lane's generation: transformers' continuous batching, each step under the weight lock.

Each manager has its own paged KV cache and generation thread, and shares the model with the
managers of the other lanes. Every step holds the weight lock (`serve_app.engine.weight_lock`) with
the revision of its lane. When a step raises, its requests are run again one by one: the request
that makes the model fail fails, the others continue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.engine.transformers_internals import (
    ManagerOutput,
    Request,
    SteppedManager,
    register_scheduler,
)
from serve_app.engine.weight_lock import WeightLock
from serve_app.settings import Settings
from serve_app.wire.errors import EngineStopped, GenerationFailed

logger = logging.getLogger(__name__)
PAGE_TOKENS = 32  # in a block of the KV cache
_STEP_S = 0.005  # about one step of a small model: the interval for polling the scheduler
_FAILURES = 4  # after this many failed requests in a row, check that the model works at all


class _StepFailed(Exception):
    """The forward pass of a batch raised its `__cause__`."""


@dataclass(slots=True)
class _Notes:
    """Facts about a request that transformers loses when the request starts over."""

    first_at: float | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # empty if not requested


class LaneManager(SteppedManager):
    """transformers' manager, with steps under the weight lock and isolation of failing requests.

    Attributes:
        capacity: tokens of KV cache; prompt and answer of a request have to fit.
        revision: the revision in the weights during each step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        weight_lock: WeightLock,
        eos_token_ids: list[int],
    ) -> None:
        self._sampler = Sampler(max_logprobs=settings.max_logprobs)
        super().__init__(
            model=model,
            generation_config=GenerationConfig(
                do_sample=False,  # `Sampler` samples
                max_new_tokens=settings.max_tokens_default,
                eos_token_id=eos_token_ids or -1,
            ),
            config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=-(-settings.lane_tokens // PAGE_TOKENS),
                max_batch_tokens=settings.max_batch_tokens,
                max_requests_per_batch=settings.max_ongoing_requests,
                # None on a CPU, where True would only make transformers warn
                use_cuda_graph=settings.cuda_graphs if model.device.type == "cuda" else None,
                # a step has to end with its tokens: other lanes change the weights between steps
                use_async_batching=False,
                scheduler_type=register_scheduler(),
                per_request_processors=True,
            ),
            logits=self._sampler,
        )
        self.capacity = settings.lane_tokens
        self.revision = weight_lock.slot.revision
        self._weight_lock = weight_lock
        self._notes: dict[str, _Notes] = {}
        self._failures = 0

    @property
    def alive(self) -> bool:
        return bool(self.is_running()) and not self.failed

    async def run(
        self,
        request_id: str,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stream: bool,
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Outputs of one request; only the finished one unless `stream`."""
        if not self.alive:
            raise EngineStopped
        outputs: asyncio.Queue[ManagerOutput] = asyncio.Queue()
        notes = self._notes[request_id] = _Notes()
        self.register_result_handler(request_id, outputs.put_nowait)
        try:
            self.add_request(
                prompt_ids,
                request_id=request_id,
                max_new_tokens=max_tokens,
                streaming=stream,
                sampling=sampling,
            )
            finished = False
            while not finished:
                output = await self._next(outputs)
                while not outputs.empty():  # a slow reader skips to the newest output
                    output = outputs.get_nowait()
                finished = output.is_finished()
                if output.error is not None:
                    raise GenerationFailed(output.error) if self.alive else EngineStopped
                tokens = output.generated_tokens
                yield GenerationOutput(
                    token_ids=tokens,
                    finished=finished,
                    logprobs=notes.logprobs[: len(tokens)],
                    first_at=notes.first_at,
                )
        finally:
            self._notes.pop(request_id, None)

    async def cancel(self, request_id: str) -> None:
        """Removes a request; returns when no further step can contain it."""
        # the thread reads cancellations after new requests, but not at the same moment
        while self.alive and self.is_queued(request_id):
            await asyncio.sleep(_STEP_S)
        self.cancel_request(request_id)
        while self.alive and not self.has_left(request_id):
            await asyncio.sleep(_STEP_S)
        self.remove_result_handler(request_id)

    def forget_prefixes(self) -> None:
        """Empties the prefix cache. Waits until the scheduler has no active request.

        A cancelled request has left its lane shortly before the scheduler drops it.
        """
        while not self.try_empty_cache():
            time.sleep(_STEP_S)

    async def _next(self, outputs: asyncio.Queue[ManagerOutput]) -> ManagerOutput:
        while True:
            try:
                async with asyncio.timeout(1.0):
                    return await outputs.get()
            except TimeoutError:
                if not self.alive:
                    raise EngineStopped from None

    # ---- in the generation thread -------------------------------------------------------------

    def run_step(self) -> None:
        with self._weight_lock.on(self.revision):
            try:
                super().run_step()
            except Exception as error:
                raise _StepFailed(str(error)) from error
        self._failures = 0
        self._note(time.perf_counter())

    def _note(self, now: float) -> None:
        """Stores first-token times and logprobs of a finished step before it is delivered."""
        # a caller may remove its notes at any moment: look them up once
        for state in self.last_batch(new_token=True):
            if notes := self._notes.get(state.request_id):
                notes.first_at = notes.first_at or now
        for request_id, logprobs in self._sampler.take().items():
            if notes := self._notes.get(request_id):
                notes.logprobs.append(logprobs)

    def run_iteration(self) -> bool:
        try:
            return super().run_iteration()
        except _StepFailed as failed:
            self._isolate(self.last_batch(), failed)
            return True

    def _isolate(self, batch: list[Request], failed: _StepFailed) -> None:
        """Finds the request that makes the model fail: runs each alone, from its start."""
        if len(batch) == 1:
            self._fail(batch[0], failed)
            return
        scheduler = self.scheduler
        scheduler.restart_all()  # so that a request alone has the whole KV cache
        try:
            for state in batch:
                scheduler.only = state.request_id
                while scheduler.awaits_first_token(state.request_id):
                    if not self.run_iteration():
                        return  # the thread has to stop
                scheduler.restart(state.request_id)
        finally:
            scheduler.only = None

    def _fail(self, state: Request, failed: _StepFailed) -> None:
        self._failures += 1
        if self._failures >= _FAILURES and not self._works():
            raise failed.__cause__ or failed  # ends the thread, and so this replica
        logger.warning(f"a request made the model fail: {failed}")
        self.fail_request(state, failed.__cause__ or failed)

    def _works(self) -> bool:
        """True if the model can generate one token for a request of its own."""
        scheduler = self.scheduler
        only, probe = scheduler.only, scheduler.add_probe()
        scheduler.only = probe
        try:
            while scheduler.awaits_first_token(probe):
                if not super().run_iteration():
                    return False
        except _StepFailed:
            scheduler.finish_request(probe)
            return False
        finally:
            scheduler.only = only
        self.discard_output()
        return True
