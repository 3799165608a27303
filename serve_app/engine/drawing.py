"""Draws a token from the scores of each row: inverse CDF, with one uniform number u for each row.

A row takes the first token at which the running sum of its probabilities passes u. u is made on
the host, so nothing random happens on the device, and a CUDA graph can hold the whole draw. Each
row is computed by itself, so a seeded request gets the same tokens whatever else is in the batch.

Shapes: B rows, R rows that are drawn, V tokens in the vocabulary, K candidates. Arguments travel
as `args_4B`: temperature, top_p, top_k, u. To force a token: temperature -1, and the token's id
(exact in float32) as top_k.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.engine.sampling_params import SamplingParams

ARGUMENTS = 4
FORCED = -1.0
_COLDEST = 1e-4  # below this a temperature is as good as 0, and 1 / temperature would overflow
_FEW = 1024  # candidates that nearly always hold top_p; else the whole vocabulary is sorted
_UNIFORM_BYTES = 3  # 24 bits, so that u is exact, and below 1, in float32


def uniform(sampling: SamplingParams, position: int) -> float:
    """A number in [0, 1) for the token at `position` of the sequence, prompt included."""
    if sampling.seed is None:
        return random.random()
    digest = blake2b(f"{sampling.seed}:{position}".encode(), digest_size=_UNIFORM_BYTES).digest()
    return float(int.from_bytes(digest, "big") / 256**_UNIFORM_BYTES)


def choose(
    scores_BV: torch.Tensor, samplings: Sequence[SamplingParams], uniforms: Sequence[float]
) -> torch.Tensor:
    """The token of each row, int64 [B], on the device of the scores. The scores do not change.

    Ignores `forced`: only `Sampler` knows the position of each row.
    """
    args_4B = arguments(samplings, uniforms, [None] * len(samplings)).to(scores_BV.device)
    if scores_BV.device.type != "cpu":
        return draw_on_device(scores_BV, args_4B)[0].squeeze(-1)
    row_R, token_R = draw_on_host(scores_BV, args_4B)
    return scores_BV.argmax(-1).index_copy_(0, row_R, token_R)


def arguments(
    samplings: Sequence[SamplingParams], uniforms: Sequence[float], forced: Sequence[int | None]
) -> torch.Tensor:
    """`args_4B` of these rows, float32. `forced`: the token to force, or None."""
    rows = [
        (sampling.temperature, sampling.top_p, sampling.top_k, min(u, 1 - 2**-24))
        if token is None
        else (FORCED, 1.0, token, 0.0)
        for sampling, u, token in zip(samplings, uniforms, forced, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, ARGUMENTS).T.contiguous()


# ---- on the host --------------------------------------------------------------------------------


def draw_on_host(
    scores_BV: torch.Tensor, args_4B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are not greedy, int64 [R], and their tokens, int64 [R]."""
    forced_F = (args_4B[0] == FORCED).nonzero().squeeze(-1)
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
    probs_RV = scores_BV[row_R].float()  # a copy, changed in place
    best_R1 = probs_RV.amax(-1, keepdim=True)
    probs_RV = probs_RV.sub_(best_R1).div_(temperature_R1.clamp(min=_COLDEST)).softmax(-1)
    filters = zip(top_k_R1.tolist(), top_p_R1.tolist(), strict=True)
    for probs_V, ((top_k,), (top_p,)) in zip(probs_RV.numpy(), filters, strict=True):
        if top_k > 0 or top_p < 1:
            keep_likeliest(probs_V, top_k=int(min(top_k, len(probs_V))), top_p=top_p)
    reached_RV = probs_RV.cumsum_(-1)
    token_R1 = torch.searchsorted(reached_RV, u_R1 * reached_RV[:, -1:], right=True)
    sound_R = best_R1.isfinite().squeeze(-1)  # else there is nothing to draw from: argmax decides
    return row_R[sound_R], token_R1.squeeze(-1)[sound_R]


def keep_likeliest(probs_V: NDArray[np.float32], *, top_k: int, top_p: float) -> None:
    """Sets to 0, in place, the tokens outside top_k (0: all) and then top_p; of equals, the later.

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
    # torch sums in float64 inside, and takes a third of numpy's time
    return ranked_K, torch.from_numpy(ranked_K).cumsum(-1).numpy()


# ---- on an accelerator --------------------------------------------------------------------------


def draw_on_device(
    scores_BV: torch.Tensor, args_4B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row, int64 [B, 1], and True where it was drawn or forced, bool [B, 1].

    Never branches on data, so a CUDA graph can hold it.
    """
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
    forced_B1 = temperature_B1 == FORCED
    token_B1 = torch.where(
        drawn_B1, token_BV.gather(1, place_B1), scores_BV.argmax(-1, keepdim=True)
    )
    return torch.where(forced_B1, top_k_B1.long(), token_B1), drawn_B1 | forced_B1
