"""Encoder-decoder generation: `generate` on a batch; each row samples, streams and ends by itself.

transformers runs encoder, cache and loop, and takes the likeliest token of each row. A logits
processor inside that loop draws each row's token, makes it the likeliest, and delivers it.

Shapes: B rows, L tokens of the longest, V tokens in the vocabulary, N alternatives.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hotswap_lib import Revision, Slot
from serve_app.engine.batching import BatchEngine, Job
from serve_app.engine.drawing import choose, uniform
from serve_app.engine.engine import Ticket
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.settings import Settings
from serve_app.wire.errors import EngineStopped

_GREEDY = SamplingParams(temperature=0.0)
_NO_LOGPROB = -9999.0  # OpenAI's number for a logarithm that JSON cannot represent


class Generation(Job):
    """One row. Written by the model thread; the event loop reads `outputs`.

    Attributes:
        decoder_ids: the token ids that the decoder starts with; known after the first step.
        outputs: of the generation; the last one is finished. None: it has failed.
    """

    def __init__(
        self,
        revision: Revision,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stream: bool,
    ) -> None:
        super().__init__(revision)
        self.prompt_ids = prompt_ids
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.stream = stream
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.decoder_ids: list[int] = []
        self.finished = False
        self.outputs: asyncio.Queue[GenerationOutput | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    @property
    def over(self) -> bool:
        return self.finished or self.cancelled

    def uniform(self) -> float:
        """The uniform number that decides the next token."""
        return uniform(self.sampling, len(self.prompt_ids) + len(self.token_ids))

    def add(self, token_id: int, logprobs: TokenLogprobs | None, *, last: bool) -> None:
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.finished = last or len(self.token_ids) >= self.max_tokens
        if self.finished or self.stream:
            output = GenerationOutput(
                token_ids=[*self.token_ids], finished=self.finished, logprobs=[*self.logprobs]
            )
            self._loop.call_soon_threadsafe(self._deliver, output)

    def _deliver(self, output: GenerationOutput) -> None:
        self.outputs.put_nowait(output)
        if output.finished:  # it does not wait for the other rows of its batch
            self.finish(None)


class Seq2SeqEngine(BatchEngine[Generation]):
    """An encoder-decoder. A batch runs until its longest answer ends; the next batch waits."""

    def __init__(self, slot: Slot, settings: Settings, *, eos_token_ids: list[int]) -> None:
        super().__init__(slot, settings)
        self._eos = frozenset(eos_token_ids)
        self._model: Any = slot.model.get_base_model()
        self._config = _config(self._model)
        # Nothing is compiled: with a growing cache only small regions can be, and calling those
        # made a token of a T5 on a CPU 1.8 times as slow as eager.

    async def generate(
        self,
        ticket: Ticket,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stream: bool,
    ) -> AsyncGenerator[GenerationOutput, None]:
        job = Generation(
            ticket.revision, prompt_ids, max_tokens=max_tokens, sampling=sampling, stream=stream
        )
        running = asyncio.create_task(self._result(ticket, job))
        running.add_done_callback(lambda _: job.outputs.put_nowait(None))
        try:
            while (output := await job.outputs.get()) is not None:
                yield output
                if output.finished:
                    return
            running.result()
        finally:
            running.cancel()
            await asyncio.wait([running])

    def ended_by_itself(self, token_ids: list[int]) -> bool:
        return bool(token_ids) and token_ids[-1] in self._eos

    # ---- in the model thread ------------------------------------------------------------------

    def _run(self, jobs: Sequence[Generation]) -> list[EngineStopped | None]:
        running = [job for job in jobs if not job.over]
        if running:
            self._generate(running)
        return [None if job.over else EngineStopped() for job in jobs]

    def _generate(self, jobs: Sequence[Generation]) -> None:
        begun: dict[str, Any] = {}
        if jobs[0].decoder_ids:  # alone, after its batch failed: it keeps the tokens it delivered
            [job] = jobs
            begun = {"decoder_input_ids": self._tensor([[*job.decoder_ids, *job.token_ids]])}
        self._run_generate(
            [job.prompt_ids for job in jobs],
            most=max(job.max_tokens - len(job.token_ids) for job in jobs),
            logits_processor=LogitsProcessorList([_Draw(jobs, self._eos)]),
            stopping_criteria=StoppingCriteriaList([_End(jobs, self)]),
            **begun,
        )

    def _run_every_shape(self) -> None:
        self._run_generate([[self._config.pad_token_id]], most=2)  # what is loaded on first use

    def _run_generate(self, prompts: Sequence[list[int]], *, most: int, **how: Any) -> None:
        length = max(map(len, prompts))
        pad = self._config.pad_token_id
        ids = [[*prompt, *[pad] * (length - len(prompt))] for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts]
        config = copy.deepcopy(self._config)
        config.update(max_new_tokens=most)
        self._model.generate(
            input_ids=self._tensor(ids),
            attention_mask=self._tensor(mask),
            generation_config=config,
            **how,
        )

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self._model.device)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Samples one token per row and masks the logits so that `generate`'s argmax returns it."""

    def __init__(self, jobs: Sequence[Generation], eos: frozenset[int]) -> None:
        self._jobs = jobs
        self._eos = eos

    def __call__(self, input_ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        samplings = [_GREEDY if job.over else job.sampling for job in self._jobs]
        uniforms = [0.0 if job.over else job.uniform() for job in self._jobs]
        token_B = choose(scores_BV, samplings, uniforms)
        for row, (job, token) in enumerate(zip(self._jobs, token_B.tolist(), strict=True)):
            if job.over:
                continue
            job.decoder_ids = job.decoder_ids or input_ids_BL[row].tolist()
            alternatives = job.sampling.logprobs
            logprobs = None
            if alternatives is not None:
                logprobs = _logprobs(scores_BV[row], token, alternatives)
            job.add(token, logprobs, last=token in self._eos)
        return torch.full_like(scores_BV, -torch.inf).scatter(1, token_B.unsqueeze(-1), 0.0)


class _End(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when it is finished or cancelled, and all rows when the engine stops."""

    def __init__(self, jobs: Sequence[Generation], engine: Seq2SeqEngine) -> None:
        self._jobs = jobs
        self._engine = engine

    def __call__(
        self,
        input_ids_BL: torch.Tensor,
        scores: Any,  # noqa: ARG002
        **_: Any,
    ) -> torch.Tensor:
        over = [job.over or not self._engine.alive for job in self._jobs]
        return torch.tensor(over, device=input_ids_BL.device)


def _logprobs(scores_V: torch.Tensor, token: int, alternatives: int) -> TokenLogprobs:
    logprobs_V = scores_V.float().log_softmax(-1)
    best_N, token_N = logprobs_V.topk(min(alternatives, len(logprobs_V)))
    pairs = zip(token_N.tolist(), best_N.tolist(), strict=True)
    chosen = float(logprobs_V[token])
    return TokenLogprobs(
        chosen=chosen if math.isfinite(chosen) else _NO_LOGPROB,
        top=tuple((other, logprob) for other, logprob in pairs if math.isfinite(logprob)),
    )


def _config(model: Any) -> Any:
    """The checkpoint's generation config, for one greedy sequence that ignores other rows."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_length=None,
        # it would force the end token at the end of the batch, not of the row
        forced_eos_token_id=None,
    )
    if config.pad_token_id is None:
        config.pad_token_id = model.config.pad_token_id or 0
    return config
