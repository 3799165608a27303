"""One lane's generation: transformers' continuous batching, its steps taken in turns.

A manager has a paged KV cache and a thread of its own, and shares the model with those of the other
lanes: each step is a turn (`serve_app.engine.weight_lock`) on the revision of its lane. A step that raises is
taken apart until the request that makes it raise is known; that one fails, the others go on.

Everything of transformers' manager that is not public API is used here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.requests import GenerationOutput as ManagerOutput
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)

from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.engine.weight_lock import WeightLock
from serve_app.settings import Settings
from serve_app.wire.errors import EngineStopped, GenerationFailed

logger = logging.getLogger(__name__)
PAGE_TOKENS = 32  # of a block of the KV cache
_STEP_S = 0.005  # about one step of a small model: how soon to look again at the scheduler
_FAILURES = 4  # requests that fail in a row: time to see whether the model works at all


class _StepFailed(Exception):
    """The forward pass of a batch raised; `__cause__` is what."""


class _Notes:
    """What a request needs to know of its steps and transformers forgets when it starts over."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.logprobs: list[TokenLogprobs] = []  # empty when the request wants none


class LaneScheduler(FIFOScheduler):  # type: ignore[misc]
    """First in, first out; but while `only` is set, that request alone."""

    only: str | None = None

    def schedule_batch(self, *budgets: int) -> Any:
        # a full cache bars new requests until one finishes; if those were cancelled, none ever does
        if not self.active_requests:
            self.block_new_requests = False
        return super().schedule_batch(*budgets)

    def start_over(self, state: RequestState) -> None:
        """Back to those who wait, with the tokens that it has as a part of its prompt."""
        again = state.create_equivalent_initial_request()
        self.finish_request(state.request_id)
        self.add_waiting_request(again)

    def _process_candidates(self, candidates: list[RequestState], *rest: Any) -> Any:
        if self.only is not None:
            candidates = [state for state in candidates if state.request_id == self.only]
        return super()._process_candidates(candidates, *rest)


SCHEDULER_MAPPING["hotswap"] = LaneScheduler


class LaneManager(ContinuousBatchingManager):  # type: ignore[misc]
    """transformers' manager, with its steps taken in turns and a request's crash kept to itself."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        weight_lock: WeightLock,
        eos_token_ids: list[int],
    ) -> None:
        super().__init__(
            model=model,
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler samples
                max_new_tokens=settings.max_tokens_default,
                eos_token_id=eos_token_ids or -1,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=-(-settings.lane_tokens // PAGE_TOKENS),
                max_batch_tokens=settings.max_batch_tokens,
                max_requests_per_batch=settings.max_ongoing_requests,
                # None on a CPU, where True would only make transformers warn
                use_cuda_graph=settings.cuda_graphs if model.device.type == "cuda" else None,
                # a step is over when its tokens are here: lanes change the weights between steps
                use_async_batching=False,
                scheduler_type="hotswap",
                per_request_processors=True,
            ),
        )
        self.capacity = settings.lane_tokens
        self.revision = weight_lock.slot.revision
        self._weight_lock = weight_lock
        self._sampler = Sampler(max_logprobs=settings.max_logprobs)
        self.logit_processor = self._sampler
        self._notes: dict[str, _Notes] = {}
        self._failures = 0

    @property
    def alive(self) -> bool:
        return self.is_running() and self.background_thread_status.fatal_error is None

    async def run(
        self,
        request_id: str,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stream: bool,
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Steps of one request; only the finished one unless `stream`."""
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
                while not outputs.empty():  # who reads slowly gets more at once, not more to hold
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
        """Take a request out; returns when no step can contain it any more."""
        # the thread reads what is cancelled after what is new, but not in the same moment
        while self.alive and self._is_new(request_id):
            await asyncio.sleep(_STEP_S)
        self.cancel_request(request_id)
        while self.alive and not self._is_out(request_id):
            await asyncio.sleep(_STEP_S)
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)

    def forget_prefixes(self) -> None:
        """Empty the cache. Between two steps, and only when the scheduler has nothing left to run.

        A cancelled request is out of its lane a moment before the scheduler drops it.
        """
        while True:
            with self.pause():
                processor = self.batch_processor
                assert processor is not None
                if not processor.scheduler.active_requests:
                    processor.cache.reset()
                    return
            time.sleep(_STEP_S)

    def _is_new(self, request_id: str) -> bool:
        with self.input_queue.mutex:
            return any(state.request_id == request_id for state in self.input_queue.queue)

    def _is_out(self, request_id: str) -> bool:
        processor = self.batch_processor
        return processor is None or (
            self.cancel_queue.empty() and processor.scheduler.request_is_cancelled(request_id)
        )

    async def _next(self, outputs: asyncio.Queue[ManagerOutput]) -> ManagerOutput:
        while True:
            try:
                async with asyncio.timeout(1.0):
                    return await outputs.get()
            except TimeoutError:
                if not self.alive:
                    raise EngineStopped from None

    # ---- in the generation thread -------------------------------------------------------------

    def _generation_step(self) -> None:
        with self._weight_lock.on(self.revision):
            try:
                super()._generation_step()
            except Exception as error:
                raise _StepFailed(str(error)) from error
        self._failures = 0
        self._note(time.perf_counter())

    def _note(self, now: float) -> None:
        """What the step that just ended says about its requests, before anybody hears of it."""
        processor = self.batch_processor
        assert processor is not None
        for future in self._batch(processor):
            # whoever waited for it may be gone at any moment: one look, and then what was found
            if future.has_new_token and (notes := self._notes.get(future.state.request_id)):
                notes.first_at = notes.first_at or now
        for request_id, logprobs in self._sampler.take().items():
            if notes := self._notes.get(request_id):
                notes.logprobs.append(logprobs)

    def _generation_loop_body(
        self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool
    ) -> bool:
        try:
            goes_on: bool = super()._generation_loop_body(batch_processor, bootstrapping)
        except _StepFailed as failed:
            batch = [future.state for future in self._batch(batch_processor)]
            self._isolate(batch_processor, batch, failed)
            return True
        return goes_on

    def _isolate(
        self, processor: ContinuousBatchProcessor, batch: list[RequestState], failed: _StepFailed
    ) -> None:
        """Find out who makes the model fail: each of the batch once more, alone, from its start."""
        if len(batch) == 1:
            self._fail(processor, batch[0], failed)
            return
        scheduler = processor.scheduler
        for state in list(scheduler.active_requests.values()):  # nobody's pages are in the way
            scheduler.start_over(state)
        try:
            for state in batch:
                scheduler.only = state.request_id
                while self._has_no_token(processor, state):
                    if not self._generation_loop_body(processor, False):
                        return  # the thread is to stop
                if (works := scheduler.active_requests.get(state.request_id)) is not None:
                    scheduler.start_over(works)
        finally:
            scheduler.only = None

    def _fail(
        self, processor: ContinuousBatchProcessor, state: RequestState, failed: _StepFailed
    ) -> None:
        self._failures += 1
        if self._failures >= _FAILURES and not self._works(processor):
            raise failed.__cause__ or failed  # ends the thread, and so this replica
        logger.warning(f"a request made the model fail: {failed}")
        processor._handle_request_error(failed.__cause__ or failed, state)
        processor.scheduler.finish_request(state.request_id)

    def _works(self, processor: ContinuousBatchProcessor) -> bool:
        """Whether the model runs at all: one token for a request of its own."""
        scheduler, only = processor.scheduler, processor.scheduler.only
        probe = RequestState(uuid.uuid4().hex, [0], max_new_tokens=1)
        scheduler.add_waiting_request(probe)
        scheduler.only = probe.request_id
        try:
            while self._has_no_token(processor, probe):
                if not super()._generation_loop_body(processor, False):
                    return False
        except _StepFailed:
            scheduler.finish_request(probe.request_id)
            return False
        finally:
            scheduler.only = only
        self.output_router.output_queue.get_nowait()  # nobody else waits for what has no handler
        return True

    def _has_no_token(self, processor: ContinuousBatchProcessor, before: RequestState) -> bool:
        scheduler = processor.scheduler
        if before.request_id in scheduler.waiting_requests:
            return True
        now = scheduler.active_requests.get(before.request_id)
        return now is not None and now.generated_len() == 0

    def _batch(self, processor: ContinuousBatchProcessor) -> list[Any]:
        return list(processor.inputs_and_outputs.requests_in_batch)
