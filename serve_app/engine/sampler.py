"""Per-request sampling: inverse CDF, with one uniform number for each row, made on the host.

A row takes the first token at which the running sum of its probabilities passes u. Nothing random
happens on the device, so a CUDA graph can hold it, and a seeded request draws the same numbers
whatever runs beside it. Every row is computed by itself, for the same reason.

Shapes: B rows (one for each new token), R rows that are drawn, V tokens in the vocabulary, K
candidates, N alternatives. Arguments travel as `args_4B`: temperature, top_p, top_k, u; or, where a
token is forced, a temperature of -1 and the token's id (exact in float32) as top_k.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs

_GREEDY = SamplingParams(temperature=0.0)
_ARGUMENTS = 4
_FORCED = -1.0
_COLDEST = 1e-4  # below this a temperature is as good as 0, and 1 / temperature would overflow
_FEW = 1024  # candidates that nearly always hold top_p; else the whole vocabulary is sorted
_UNIFORM_BYTES = 3  # 24 bits, so that u is exact, and below 1, in float32
_NO_LOGPROB = -9999.0  # OpenAI's number for what JSON cannot say


def uniform(sampling: SamplingParams, position: int) -> float:
    """A number in [0, 1) for the token at `position` of the sequence, the prompt counted."""
    if sampling.seed is None:
        return random.random()
    digest = blake2b(f"{sampling.seed}:{position}".encode(), digest_size=_UNIFORM_BYTES).digest()
    return float(int.from_bytes(digest, "big") / 256**_UNIFORM_BYTES)


def choose(
    scores_BV: torch.Tensor, samplings: Sequence[SamplingParams], uniforms: Sequence[float]
) -> torch.Tensor:
    """The token of each row, int64 [B], on the device of the scores, which stay as they are.

    Of `forced` it knows nothing: where that is wanted, the rows know their positions (`Sampler`).
    """
    args_4B = _arguments(samplings, uniforms, [None] * len(samplings)).to(scores_BV.device)
    if scores_BV.device.type != "cpu":
        return _draw_on_device(scores_BV, args_4B)[0].squeeze(-1)
    row_R, token_R = _draw_on_host(scores_BV, args_4B)
    return scores_BV.argmax(-1).index_copy_(0, row_R, token_R)


class Sampler(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """What the manager calls instead of its list of processors. It must not sample by itself.

    The scores of a drawn row get +inf, in place, at its token: the manager's argmax takes that.
    All others stay as they are. For one thread, and for synchronous batching: `take` is about the
    last step.
    """

    def __init__(self, *, max_logprobs: int) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.tensors_required = _ARGUMENTS
        self._max_logprobs = max_logprobs
        self._asked: list[tuple[int, str, int]] = []  # row, request id, alternatives
        # a row: logprob of the chosen token, then N times token id (exact in float32), logprob
        self._report = torch.empty(0)

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Raises TypeError unless there is a `Sampling` as `sampling`, or nothing."""
        if kwargs and not (
            list(kwargs) == ["sampling"] and isinstance(kwargs["sampling"], SamplingParams)
        ):
            raise TypeError(
                f"a request takes sampling=SamplingParams(...) or nothing, not {kwargs}"
            )

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()  # the bits of 0.0: temperature 0, greedy

    def prepare_tensor_args(
        self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        samplings = [state.logit_processor_kwargs.get("sampling", _GREEDY) for state in states]
        # the sum stays the same when a full cache turns generated tokens into initial ones
        positions = [len(state.initial_tokens) + state.generated_len() for state in states]
        uniforms = [uniform(*pair) for pair in zip(samplings, positions, strict=True)]
        self._asked = [
            (row, state.request_id, min(sampling.logprobs, self._max_logprobs))
            for row, (state, sampling) in enumerate(zip(states, samplings, strict=True))
            if sampling.logprobs is not None
        ]
        # here, because a graph must find it, and must not own it; nobody has more rows than columns
        shape = (arg_storage.size(1), 1 + 2 * self._max_logprobs)
        if self._report.shape != shape or self._report.device != arg_storage.device:
            self._report = torch.full(shape, -math.inf, device=arg_storage.device)
        arg_storage.zero_()  # the padding of a batch must not sample as an earlier batch did
        forced = [each.forced_at(at) for each, at in zip(samplings, positions, strict=True)]
        arg_storage[:, : len(states)] = _arguments(samplings, uniforms, forced).view(torch.int32)
        return arg_storage

    def __call__(
        self,
        input_ids: torch.Tensor,  # noqa: ARG002
        scores_BV: torch.Tensor,
        logits_processor_args: torch.Tensor,
    ) -> torch.Tensor:
        args_4B = logits_processor_args[:, : scores_BV.size(0)].view(torch.float32)
        if scores_BV.device.type == "cpu":
            return self._on_host(scores_BV, args_4B)
        return self._on_device(scores_BV, args_4B)

    def take(self) -> dict[str, TokenLogprobs]:
        """Of the tokens that the last step chose, by request id, for those that asked. Once."""
        asked, self._asked = self._asked, []
        if not asked:
            return {}
        lines = self._report[[row for row, _, _ in asked]].tolist()
        return {
            request_id: _token_logprobs(line[: 1 + 2 * alternatives])
            for (_, request_id, alternatives), line in zip(asked, lines, strict=True)
        }

    def _on_host(self, scores_BV: torch.Tensor, args_4B: torch.Tensor) -> torch.Tensor:
        if not self._asked and not bool((args_4B[0] != 0).any()):
            return scores_BV
        row_R, token_R = _draw_on_host(scores_BV, args_4B)
        if self._asked:
            rows, _, alternatives = zip(*self._asked, strict=True)
            drawn = dict(zip(row_R.tolist(), token_R.tolist(), strict=True))
            tokens = [drawn[row] if row in drawn else int(scores_BV[row].argmax()) for row in rows]
            asked_BV = scores_BV[list(rows)]
            lines = _report(asked_BV, torch.tensor(tokens).unsqueeze(-1), max(alternatives))
            self._report[list(rows), : lines.size(1)] = lines
        scores_BV[row_R, token_R] = math.inf
        return scores_BV

    def _on_device(self, scores_BV: torch.Tensor, args_4B: torch.Tensor) -> torch.Tensor:
        """The same without a question to the host, so that a graph can hold it."""
        token_B1, drawn_B1 = _draw_on_device(scores_BV, args_4B)
        lines = _report(scores_BV, token_B1, self._max_logprobs)
        self._report[: lines.size(0), : lines.size(1)].copy_(lines)
        marked_B1 = scores_BV.gather(1, token_B1).masked_fill(drawn_B1, math.inf)
        return scores_BV.scatter_(1, token_B1, marked_B1)


def _arguments(
    samplings: Sequence[SamplingParams], uniforms: Sequence[float], forced: Sequence[int | None]
) -> torch.Tensor:
    rows = [
        (sampling.temperature, sampling.top_p, sampling.top_k, min(u, 1 - 2**-24))
        if token is None
        else (_FORCED, 1.0, token, 0.0)
        for sampling, u, token in zip(samplings, uniforms, forced, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, _ARGUMENTS).T.contiguous()


def _draw_on_host(
    scores_BV: torch.Tensor, args_4B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are not greedy, int64 [R], and their tokens, int64 [R]."""
    forced_F = (args_4B[0] == _FORCED).nonzero().squeeze(-1)
    row_R, token_R = _sample_on_host(scores_BV, args_4B)
    if not len(forced_F):
        return row_R, token_R
    return torch.cat([row_R, forced_F]), torch.cat([token_R, args_4B[2, forced_F].long()])


def _sample_on_host(
    scores_BV: torch.Tensor, args_4B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that sample, int64 [R], and their tokens, int64 [R]. The others cost nothing."""
    row_R = (args_4B[0] > 0).nonzero().squeeze(-1)
    temperature_R1, top_p_R1, top_k_R1, u_R1 = args_4B[:, row_R].unsqueeze(-1)
    probs_RV = scores_BV[row_R].float()  # a copy, worked on in place
    best_R1 = probs_RV.amax(-1, keepdim=True)
    probs_RV = probs_RV.sub_(best_R1).div_(temperature_R1.clamp(min=_COLDEST)).softmax(-1)
    filters = zip(top_k_R1.tolist(), top_p_R1.tolist(), strict=True)
    for probs_V, ((top_k,), (top_p,)) in zip(probs_RV.numpy(), filters, strict=True):
        if top_k > 0 or top_p < 1:
            _keep_likeliest(probs_V, top_k=int(min(top_k, len(probs_V))), top_p=top_p)
    reached_RV = probs_RV.cumsum_(-1)
    token_R1 = torch.searchsorted(reached_RV, u_R1 * reached_RV[:, -1:], right=True)
    sound_R = best_R1.isfinite().squeeze(-1)  # else there is nothing to draw from: argmax decides
    return row_R[sound_R], token_R1.squeeze(-1)[sound_R]


def _keep_likeliest(probs_V: NDArray[np.float32], *, top_k: int, top_p: float) -> None:
    """Set to 0, in place, what top_k (0: all) and then top_p leave out; of equals, the later ones.

    Only values are sorted, which numpy does about 30 times as fast as torch sorts with indices.
    """
    size = len(probs_V)
    ranked_K, reached_K = _likeliest(probs_V, top_k or min(_FEW, size))
    if not top_k and reached_K[-1] < top_p:
        ranked_K, reached_K = _likeliest(probs_V, size)
    # the whole vocabulary adds up to 1, the likeliest k do not
    wanted = top_p * reached_K[-1] if top_k else top_p
    first = min(int(np.searchsorted(reached_K, reached_K[-1] - wanted, "right")), len(ranked_K) - 1)
    kept_V = probs_V >= ranked_K[first]
    surplus = np.count_nonzero(kept_V) - (len(ranked_K) - first)
    if surplus > 0:
        kept_V[np.flatnonzero(probs_V == ranked_K[first])[-surplus:]] = False
    probs_V *= kept_V


def _likeliest(
    probs_V: NDArray[np.float32], most: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The `most` largest, in rising order, and their running sum."""
    if most < len(probs_V):
        probs_V = np.partition(probs_V, len(probs_V) - most)[-most:]
    ranked_K = np.sort(probs_V)
    # torch's sum runs in float64 inside, and takes a third of the time of numpy's
    return ranked_K, torch.from_numpy(ranked_K).cumsum(-1).numpy()


def _draw_on_device(
    scores_BV: torch.Tensor, args_4B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of every row, and whether it was drawn; both [B, 1]. No branch on data."""
    temperature_B1, top_p_B1, top_k_B1, u_B1 = args_4B.unsqueeze(-1)
    best_B1 = scores_BV.amax(-1, keepdim=True)
    scaled_BV = (scores_BV.float() - best_B1) / temperature_B1.clamp(min=_COLDEST)
    ranked_BV, token_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scores_BV.size(-1), device=scores_BV.device)
    left_out_BV = (top_k_B1 > 0) & (rank_V >= top_k_B1) & (temperature_B1 > 0)
    probs_BV = ranked_BV.softmax(-1).masked_fill(left_out_BV, 0)
    reached_BV = probs_BV.cumsum(-1)
    short_BV = reached_BV < top_p_B1 * reached_BV[:, -1:]
    last_B1 = short_BV.sum(-1, keepdim=True).clamp(max=scores_BV.size(-1) - 1)
    passed_BV = reached_BV <= u_B1 * reached_BV.gather(1, last_B1)
    place_B1 = passed_BV.sum(-1, keepdim=True).minimum(last_B1)
    drawn_B1 = (temperature_B1 > 0) & best_B1.isfinite()
    forced_B1 = temperature_B1 == _FORCED
    token_B1 = torch.where(
        drawn_B1, token_BV.gather(1, place_B1), scores_BV.argmax(-1, keepdim=True)
    )
    return torch.where(forced_B1, top_k_B1.long(), token_B1), drawn_B1 | forced_B1


def _report(scores_BV: torch.Tensor, token_B1: torch.Tensor, alternatives: int) -> torch.Tensor:
    """One line for each row, float32: see `Sampler._report`."""
    total_B1 = scores_BV.logsumexp(-1, keepdim=True)
    best_BN, token_BN = scores_BV.topk(min(alternatives, scores_BV.size(-1)))
    pairs_BN2 = torch.stack([token_BN.float(), best_BN - total_B1], -1)
    return torch.cat([scores_BV.gather(1, token_B1) - total_B1, pairs_BN2.flatten(1)], -1)


def _token_logprobs(line: Sequence[float]) -> TokenLogprobs:
    chosen, *pairs = line
    return TokenLogprobs(
        chosen=chosen if math.isfinite(chosen) else _NO_LOGPROB,
        # what cannot be chosen is no alternative
        top=tuple(
            (int(token), logprob)
            for token, logprob in zip(pairs[::2], pairs[1::2], strict=True)
            if math.isfinite(logprob)
        ),
    )
