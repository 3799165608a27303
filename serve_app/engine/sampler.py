"""Sampler: per-request sampling, forced tokens and log-probabilities in continuous batching.

Shapes: B rows (one for each new token), V tokens in the vocabulary, N alternatives. `args_4B` is
that of `serve_app.engine.drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from serve_app.engine.drawing import ARGUMENTS, arguments, draw_on_device, draw_on_host, uniform
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.transformers_internals import LogitsHook, NewToken

_GREEDY = SamplingParams(temperature=0.0)
_NO_LOGPROB = -9999.0  # OpenAI's number for a logarithm that JSON cannot represent


class Sampler(LogitsHook):
    """Chooses the token of each row, by marking it for the manager's argmax.

    The score of a drawn token is set to +inf, in place. All other scores stay as they are. For one
    thread, and for synchronous batching: `take` reports on the last step.

    Attributes:
        report: one line for each row, float32 [rows, 1 + 2N]: the logprob of the chosen token,
            then N times token id (exact in float32) and logprob. The same memory in every step,
            because a CUDA graph writes into it.
    """

    def __init__(self, *, max_logprobs: int) -> None:
        """`max_logprobs`: the most alternatives that are reported for a token."""
        super().__init__(arguments=ARGUMENTS)
        self.report = torch.empty(0)
        self._max_logprobs = max_logprobs
        self._asked: list[tuple[int, str, int]] = []  # row, request id, alternatives

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        if kwargs and not (
            list(kwargs) == ["sampling"] and isinstance(kwargs["sampling"], SamplingParams)
        ):
            raise TypeError(
                f"a request takes sampling=SamplingParams(...) or nothing, not {kwargs}"
            )

    def prepare(self, rows: Sequence[NewToken], *, most: int, device: torch.device) -> torch.Tensor:
        samplings = [row.kwargs.get("sampling", _GREEDY) for row in rows]
        self._asked = [
            (index, row.request_id, min(sampling.logprobs, self._max_logprobs))
            for index, (row, sampling) in enumerate(zip(rows, samplings, strict=True))
            if sampling.logprobs is not None
        ]
        # here and not in `process`: a CUDA graph must find this memory, and must not own it
        shape = (most, 1 + 2 * self._max_logprobs)
        if self.report.shape != shape or self.report.device != device:
            self.report = torch.full(shape, -math.inf, device=device)
        uniforms = [uniform(each, row.position) for each, row in zip(samplings, rows, strict=True)]
        forced = [each.forced_at(row.position) for each, row in zip(samplings, rows, strict=True)]
        return arguments(samplings, uniforms, forced)

    def process(self, scores_BV: torch.Tensor, args_AB: torch.Tensor) -> torch.Tensor:
        if scores_BV.device.type == "cpu":
            return self.on_host(scores_BV, args_AB)
        return self.on_device(scores_BV, args_AB)

    def take(self) -> dict[str, TokenLogprobs]:
        """Logprobs of the last step by request id, for requests that want them. Empties them."""
        asked, self._asked = self._asked, []
        if not asked:
            return {}
        lines = self.report[[row for row, _, _ in asked]].tolist()
        return {
            request_id: _token_logprobs(line[: 1 + 2 * alternatives])
            for (_, request_id, alternatives), line in zip(asked, lines, strict=True)
        }

    def on_host(self, scores_BV: torch.Tensor, args_4B: torch.Tensor) -> torch.Tensor:
        """Marks the chosen tokens. Does nothing for a batch that is all greedy."""
        if not self._asked and not bool((args_4B[0] != 0).any()):
            return scores_BV
        row_R, token_R = draw_on_host(scores_BV, args_4B)
        if self._asked:
            rows, _, alternatives = zip(*self._asked, strict=True)
            drawn = dict(zip(row_R.tolist(), token_R.tolist(), strict=True))
            tokens = [drawn[row] if row in drawn else int(scores_BV[row].argmax()) for row in rows]
            asked_BV = scores_BV[list(rows)]
            lines = _lines(asked_BV, torch.tensor(tokens).unsqueeze(-1), max(alternatives))
            self.report[list(rows), : lines.size(1)] = lines
        scores_BV[row_R, token_R] = math.inf
        return scores_BV

    def on_device(self, scores_BV: torch.Tensor, args_4B: torch.Tensor) -> torch.Tensor:
        """The same without reading anything back to the host, so that a CUDA graph can hold it."""
        token_B1, drawn_B1 = draw_on_device(scores_BV, args_4B)
        lines = _lines(scores_BV, token_B1, self._max_logprobs)
        self.report[: lines.size(0), : lines.size(1)].copy_(lines)
        marked_B1 = scores_BV.gather(1, token_B1).masked_fill(drawn_B1, math.inf)
        return scores_BV.scatter_(1, token_B1, marked_B1)


def _lines(scores_BV: torch.Tensor, token_B1: torch.Tensor, alternatives: int) -> torch.Tensor:
    """One line of `Sampler.report` for each row."""
    total_B1 = scores_BV.logsumexp(-1, keepdim=True)
    best_BN, token_BN = scores_BV.topk(min(alternatives, scores_BV.size(-1)))
    pairs_BN2 = torch.stack([token_BN.float(), best_BN - total_B1], -1)
    return torch.cat([scores_BV.gather(1, token_B1) - total_B1, pairs_BN2.flatten(1)], -1)


def _token_logprobs(line: Sequence[float]) -> TokenLogprobs:
    chosen, *pairs = line
    return TokenLogprobs(
        chosen=chosen if math.isfinite(chosen) else _NO_LOGPROB,
        # a token with probability 0 is no alternative
        top=tuple(
            (int(token), logprob)
            for token, logprob in zip(pairs[::2], pairs[1::2], strict=True)
            if math.isfinite(logprob)
        ),
    )
