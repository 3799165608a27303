"""Log-likelihoods of texts, for probes that compare revisions."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from serve_app.engine.engine import Engine, Ticket
from serve_app.engine.sampling_params import SamplingParams
from serve_app.openai.requests import TokenIds
from serve_app.replica.prompts import Prompts
from serve_app.wire.errors import InvalidRequest
from serve_app.wire.request_stats import PROBE
from serve_app.wire.text_score import TextScore


async def score_texts(
    engine: Engine, prompts: Prompts, texts: list[str], *, pin: str | None
) -> list[TextScore]:
    """Returns the log-likelihood of each text, without its first token.

    Request statistics leave these requests out. Raises `InvalidRequest` for a text with fewer than
    two tokens or more than fit.
    """
    limit = prompts.limits.tokens
    tokenized = await prompts.of_texts(texts)
    for ids in tokenized:
        if not 2 <= len(ids) <= limit:
            message = f"a text to score has 2 to {limit} tokens, and one has {len(ids)}"
            raise InvalidRequest(400, "invalid_parameter", message, "texts")
    async with engine.admit(pin, PROBE) as ticket:
        tasks = [asyncio.create_task(_score(ticket, ids)) for ids in tokenized]
        try:
            return await asyncio.gather(*tasks)
        finally:  # every generation leaves the engine before its ticket does
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _score(ticket: Ticket, ids: TokenIds) -> TextScore:
    first, *rest = ids
    sampling = SamplingParams(temperature=0.0, logprobs=0, forced=(1, tuple(rest)))
    steps = ticket.generate([first], max_tokens=len(rest), sampling=sampling, stream=False)
    async with aclosing(steps):
        async for step in steps:  # one step, the finished one
            logprobs = [each.chosen for each in step.logprobs]
    return TextScore(logprob=sum(logprobs), tokens=len(logprobs))
