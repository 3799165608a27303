"""Results that an engine hands out: a step of a generation, and a finished cutover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotswap_lib import Receipt
from serve_app.engine.sampling_params import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """What a generation has so far: all its tokens, the end token included.

    `logprobs`: one for each token, when the request wants them; else empty. `first_at`: when there
    was a first token, on `time.perf_counter`'s clock.
    """

    token_ids: list[int]
    finished: bool
    logprobs: Sequence[TokenLogprobs] = ()
    first_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutover:
    """What changing the default revision did, and how long its phases took."""

    receipt: Receipt
    drain_ms: float
    verify_ms: float
