"""The engine: transformers' continuous batching around one prepared, compiled model.

Requests go in as token ids and come out as tokens, each on exactly one revision. A commit happens
only between two steps, while no request is inside (`Admission`), and empties the prefix cache,
because its blocks are found by tokens alone and would serve the old adapter's keys and values.

Everything of the manager that is not public API is used here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import TypeVar

from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import GenerationOutput

from hotswap_lib import CompileGuard, Receipt, Slot, Staged

from .admission import Admission
from .regions import compile_regions
from .sampler import Temperature
from .settings import Settings

_PAGE_TOKENS = 32
_STEP_S = 0.005  # about one step of a small model: how soon to look again at the scheduler
T = TypeVar("T")


class GenerationFailed(Exception):
    """The engine could not finish a request."""

    code = "generation_failed"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the generation failed: {self.why}"


class EngineStopped(Exception):
    """The generation thread is gone; the replica must be replaced."""

    code = "engine_stopped"

    def __str__(self) -> str:
        return "the generation thread has stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a request has so far. `token_ids`: all generated tokens, the end token included."""

    revision: str
    token_ids: list[int]
    finished: bool


class Engine:
    """One model, one generation thread, one admission gate. For one event loop."""

    def __init__(self, slot: Slot, settings: Settings, *, eos_token_ids: list[int]) -> None:
        self.slot = slot
        self.admission = Admission()
        self.guard = CompileGuard()
        self._settings = settings
        self._eos = frozenset(eos_token_ids)
        self._cancelling: set[asyncio.Task[None]] = set()
        model = slot.model.base_model.model
        self.compiled_regions = compile_regions(model) if settings.compile else 0
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False,  # the Temperature processor samples
                max_new_tokens=settings.max_tokens_default,
                eos_token_id=eos_token_ids or -1,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_TOKENS,
                num_blocks=-(-settings.kv_cache_tokens // _PAGE_TOKENS),
                max_batch_tokens=settings.max_batch_tokens,
                max_requests_per_batch=settings.max_ongoing_requests,
                # None on a CPU, where True would only make transformers warn
                use_cuda_graph=settings.cuda_graphs if model.device.type == "cuda" else None,
                per_request_processors=True,
            ),
        )
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Temperature()]))
        processors.tensors_required = 1  # it counts only the processors that it converted itself
        self._manager.logit_processor = processors

    def start(self) -> None:
        self._manager.warmup()  # captures CUDA graphs where there are any
        self._manager.start()

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        return (
            self._manager.is_running()
            and self._manager.background_thread_status.fatal_error is None
        )

    async def warm_up(self) -> float:
        """Run every shape class that a request can meet, then arm the guard. Returns seconds.

        Prefill and decode, alone and batched: dynamo treats a size of 1 apart from all others.
        """
        began = time.monotonic()
        self.admission.open()
        short, long = [1, 2, 3, 4], list(range(5, 5 + 2 * _PAGE_TOKENS))
        for prompts in ([[1]], [short], [short, long], [long] * 3):
            await asyncio.gather(*(self._finish(ids) for ids in prompts))
        self.admission.close()
        self._forget_prefixes()
        self.guard.arm()
        return time.monotonic() - began

    async def generate(
        self, prompt_ids: list[int], *, max_tokens: int, temperature: float, stream: bool
    ) -> AsyncGenerator[Step, None]:
        """Steps of one request; only the finished one unless `stream`.

        Waits while the gate is closed. Leaving the iterator early cancels the request. Raises
        `GenerationFailed`, or `EngineStopped` when no thread is there to generate.
        """
        await self.admission.enter()
        revision = str(self.slot.revision)
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        request_id = uuid.uuid4().hex
        finished = False
        try:
            if not self.alive:
                raise EngineStopped
            self._manager.register_result_handler(request_id, outputs.put_nowait)
            self._manager.add_request(
                prompt_ids,
                request_id=request_id,
                max_new_tokens=max_tokens,
                streaming=stream,
                temperature=temperature,
            )
            while not finished:
                output = await self._next(outputs)
                finished = output.is_finished()
                if output.error is not None:
                    raise GenerationFailed(output.error) if self.alive else EngineStopped
                yield Step(revision=revision, token_ids=output.generated_tokens, finished=finished)
        finally:
            if finished or not self.alive:
                self.admission.leave()
            else:  # inside until the engine has let go, even if whoever waits here is cancelled
                task = asyncio.create_task(self._cancel(request_id))
                self._cancelling.add(task)
                task.add_done_callback(self._cancelling.discard)

    def ended_by_itself(self, token_ids: list[int]) -> bool:
        return bool(token_ids) and token_ids[-1] in self._eos

    async def swap(self, staged: Staged) -> tuple[Receipt, float, float]:
        """Drain, commit, verify, admit again. Returns the receipt, drain ms and verify ms.

        Raises `DrainTimeout` or `VerifyFailed`; the old revision is live again then.
        """
        began = time.monotonic()
        async with self.admission.drained(timeout_s=self._settings.drain_timeout_s):
            drained = time.monotonic()
            receipt, verify_s = await _finished(asyncio.to_thread(self._commit, staged))
        return receipt, (drained - began) * 1e3, verify_s * 1e3

    def _commit(self, staged: Staged) -> tuple[Receipt, float]:
        """Between two steps, and only when the scheduler has nothing left to run.

        A cancelled request is out of the gate a moment before the scheduler drops it.
        """
        while True:
            with self._manager.pause():
                if not self._manager.batch_processor.scheduler.active_requests:
                    return self._commit_now(staged)
            time.sleep(_STEP_S)

    def _commit_now(self, staged: Staged) -> tuple[Receipt, float]:
        receipt = self.slot.commit(staged)
        began = time.monotonic()
        try:
            self.slot.verify()
        except Exception:
            self.slot.rollback()
            raise
        self._forget_prefixes()
        return receipt, time.monotonic() - began

    def _forget_prefixes(self) -> None:
        processor = self._manager.batch_processor
        assert processor is not None
        assert not processor.scheduler.active_requests
        processor.cache.reset()

    async def _finish(self, prompt_ids: list[int]) -> None:
        async for _ in self.generate(prompt_ids, max_tokens=4, temperature=0.0, stream=False):
            pass

    async def _next(self, outputs: asyncio.Queue[GenerationOutput]) -> GenerationOutput:
        while True:
            try:
                async with asyncio.timeout(1.0):
                    return await outputs.get()
            except TimeoutError:
                if not self.alive:
                    raise EngineStopped from None

    async def _cancel(self, request_id: str) -> None:
        """Take the request out of the engine, then out of the gate."""
        try:
            self._manager.cancel_request(request_id)
            processor = self._manager.batch_processor
            while (
                self.alive
                and processor
                and not processor.scheduler.request_is_cancelled(request_id)
            ):
                await asyncio.sleep(_STEP_S)
            with self._manager.output_router._lock:
                self._manager.output_router.result_handlers.pop(request_id, None)
        finally:
            self.admission.leave()


async def _finished(work: Awaitable[T]) -> T:
    """The result of `work`, waited for also when the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
