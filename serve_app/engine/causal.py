"""Text generation with a causal model: transformers' continuous batching, one manager for a lane.

Each lane has one revision, and its own paged KV cache and generation thread. All lanes share one
model; the weight lock (`serve_app.engine.weight_lock`) orders their steps. A lane that changes its
revision empties its prefix cache first: prefixes are found by tokens alone, so it would reuse keys
and values of another adapter.
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
from serve_app.engine.lanes import TURN_S, Lanes
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.steps import GenerationOutput
from serve_app.settings import Settings
from serve_app.wire.admin import LaneView
from serve_app.wire.errors import EngineStopped, GenerationFailed

_GREEDY = SamplingParams(temperature=0.0)


class CausalEngine(Engine):
    """`settings.lanes` generation lanes over one model.

    Attributes:
        managers: one for each lane.
    """

    scores_texts = True

    def __init__(
        self,
        slot: Slot,
        settings: Settings,
        *,
        eos_token_ids: list[int],
        turn_s: float = TURN_S,
    ) -> None:
        """`turn_s`: a lane keeps its revision for at least this long while others wait."""
        super().__init__(slot, settings)
        self._eos = frozenset(eos_token_ids)
        model = slot.model.get_base_model()
        self.compiled_regions = _compile(model) if settings.compile else 0
        wait = settings.lane_overflow == "wait"
        self._lanes = Lanes(settings.lanes, self._clear, wait=wait, turn_s=turn_s)
        self.managers = tuple(
            LaneManager(model, settings, self.weight_lock, eos_token_ids)
            for _ in range(settings.lanes)
        )

    def start(self) -> None:
        for manager in self.managers:
            with self.weight_lock.on(self.default):
                manager.warmup()  # captures CUDA graphs where there are any
            manager.start()

    def stop(self) -> None:
        for manager in self.managers:
            manager.stop(block=True, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        return all(manager.alive for manager in self.managers)

    async def warm_up(self) -> float:
        """Prefill and decode, alone and batched: dynamo treats a size of 1 as a special case.

        Every lane, because each has its own buffers, and on a GPU its own graphs.
        """
        began = time.monotonic()
        short, long = [1, 2, 3, 4], list(range(5, 5 + 2 * PAGE_TOKENS))
        sampled = SamplingParams(temperature=1.0, top_p=0.9, seed=0)
        for manager in self.managers:
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
        assert ticket.lane is not None
        manager = self.managers[ticket.lane]
        # a request that can never fit would stop the generation thread
        if len(prompt_ids) + max_tokens > manager.capacity:
            raise GenerationFailed(f"it needs more than the {manager.capacity} tokens of KV cache")
        request_id = uuid.uuid4().hex
        finished, tokens = False, 0
        outputs = manager.run(
            request_id, prompt_ids, max_tokens=max_tokens, sampling=sampling, stream=stream
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    finished = output.finished
                    ticket.record(output, new_tokens=len(output.token_ids) - tokens)
                    tokens = len(output.token_ids)
                    yield output
        finally:
            if not finished and manager.alive:
                # the request counts as running until the scheduler has removed it, even if its
                # caller was cancelled
                task = asyncio.create_task(manager.cancel(request_id))
                ticket.cancelling.add(task)
                task.add_done_callback(ticket.cancelling.discard)

    async def _reserve_lane(self, revision: Revision) -> None:
        await self._lanes.reserve(revision)

    async def _enter_lane(self, revision: Revision) -> int:
        return await self._lanes.enter(revision)

    def _leave_lane(self, lane: int) -> None:
        self._lanes.leave(lane)

    def _on_removed(self, revision: Revision) -> None:
        self._lanes.forget(revision)

    async def _clear(self, lane: int, revision: Revision) -> None:
        """Resets the prefix cache before the lane serves another revision."""
        manager = self.managers[lane]
        if manager.revision != revision:
            try:
                await asyncio.to_thread(manager.forget_prefixes)
            except Exception:
                if not manager.alive:  # the reason, and the error that the client has to get
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
