"""Text generation with a causal model: transformers' continuous batching, one manager a lane.

Requests go in as token ids and come out as tokens. Each lane has one revision, a paged KV cache and
a generation thread of its own; all share one model, and take weight_lock at its weights step by step
(`serve_app.engine.weight_lock`). A lane that changes its revision forgets its cached prefixes first: they are
found by tokens alone and would serve another adapter's keys and values.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from transformers import PreTrainedModel

from hotswap_lib import Revision, Slot
from serve_app.engine.attention import make_opaque
from serve_app.engine.compile import compile_layers, compile_regions
from serve_app.engine.continuous_batching import PAGE_TOKENS, LaneManager
from serve_app.engine.engine import Engine, Ticket
from serve_app.engine.lanes import Lanes
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.steps import GenerationOutput
from serve_app.settings import Settings
from serve_app.wire.admin import LaneView
from serve_app.wire.errors import EngineStopped, GenerationFailed

_GREEDY = SamplingParams(temperature=0.0)


class CausalEngine(Engine):
    """`settings.lanes` generation lanes over one model."""

    scores_texts = True

    def __init__(self, slot: Slot, settings: Settings, *, eos_token_ids: list[int]) -> None:
        super().__init__(slot, settings)
        self._eos = frozenset(eos_token_ids)
        model = slot.model.base_model.model
        self.compiled_regions = _compile(model) if settings.compile else 0
        self._lanes = Lanes(settings.lanes, self._clear, wait=settings.lane_overflow == "wait")
        self._managers = [
            LaneManager(model, settings, self.weight_lock, eos_token_ids)
            for _ in range(settings.lanes)
        ]

    def start(self) -> None:
        for manager in self._managers:
            with self.weight_lock.on(self.default):
                manager.warmup()  # captures CUDA graphs where there are any
            manager.start()

    def stop(self) -> None:
        for manager in self._managers:
            manager.stop(block=True, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        return all(manager.alive for manager in self._managers)

    async def warm_up(self) -> float:
        """Prefill and decode, alone and batched: dynamo treats a size of 1 apart from all others.

        Every lane, because each has buffers, and on a GPU graphs, of its own.
        """
        began = time.monotonic()
        short, long = [1, 2, 3, 4], list(range(5, 5 + 2 * PAGE_TOKENS))
        sampled = SamplingParams(temperature=1.0, top_p=0.9, seed=0)
        for manager in self._managers:
            manager.revision = self.default
            for prompts in ([[1]], [short], [short, long], [long] * 3):
                for sampling in (_GREEDY, sampled):
                    await asyncio.gather(*(self._warm(manager, ids, sampling) for ids in prompts))
            await asyncio.to_thread(manager.forget_prefixes)
        self.guard.arm()
        return time.monotonic() - began

    def lanes(self) -> tuple[LaneView, ...]:
        return tuple(
            LaneView(revision=None if lane.bound is None else str(lane.bound), running=lane.running)
            for lane in self._lanes.all
        )

    def ended_by_itself(self, token_ids: list[int]) -> bool:
        return bool(token_ids) and token_ids[-1] in self._eos

    async def generate(
        self,
        ticket: Ticket,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stream: bool,
    ) -> AsyncGenerator[GenerationOutput, None]:
        assert ticket.seat is not None
        manager = self._managers[ticket.seat]
        if len(prompt_ids) + max_tokens > manager.capacity:  # alone, it would stop the thread
            raise GenerationFailed(f"it needs more than the {manager.capacity} tokens of KV cache")
        request_id = uuid.uuid4().hex
        finished, tokens = False, 0
        steps = manager.run(
            request_id, prompt_ids, max_tokens=max_tokens, sampling=sampling, stream=stream
        )
        try:
            async with aclosing(steps):
                async for step in steps:
                    finished = step.finished
                    ticket.heard(step, new=len(step.token_ids) - tokens)
                    tokens = len(step.token_ids)
                    yield step
        finally:
            if not finished and manager.alive:
                # inside until the manager has let go, even if whoever waits here is cancelled
                task = asyncio.create_task(manager.cancel(request_id))
                ticket.leaving.add(task)
                task.add_done_callback(ticket.leaving.discard)

    async def _make_room(self, revision: Revision) -> None:
        await self._lanes.reserve(revision)

    async def _take_seat(self, revision: Revision) -> int:
        return await self._lanes.enter(revision)

    def _leave_seat(self, seat: int) -> None:
        self._lanes.leave(seat)

    def _forgotten(self, revision: Revision) -> None:
        self._lanes.forget(revision)

    async def _clear(self, lane: int, revision: Revision) -> None:
        """Whoever comes next must not find what another revision left in the cache."""
        manager = self._managers[lane]
        if manager.revision != revision:
            try:
                await asyncio.to_thread(manager.forget_prefixes)
            except Exception:
                if not manager.alive:  # which is why, and what the client has to know
                    raise EngineStopped from None
                raise
            manager.revision = revision

    async def _warm(
        self, manager: LaneManager, prompt_ids: list[int], sampling: SamplingParams
    ) -> None:
        request_id = uuid.uuid4().hex
        async for _ in manager.run(
            request_id, prompt_ids, max_tokens=4, sampling=sampling, stream=False
        ):
            pass


def _compile(model: PreTrainedModel) -> int:
    return compile_layers(model) if make_opaque(model) else compile_regions(model)
