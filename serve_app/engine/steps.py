"""Results of an engine: the output of a generation so far, and a finished cutover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotswap_lib import Receipt
from serve_app.engine.sampling_params import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """All tokens that a generation has so far, the end token included.

    Attributes:
        logprobs: one for each token if the request wants them; else empty.
        first_at: time of the first token, on `time.perf_counter`'s clock.
    """

    token_ids: list[int]
    finished: bool
    logprobs: Sequence[TokenLogprobs] = ()
    first_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutover:
    """A finished change of the default revision, and how long its phases took."""

    receipt: Receipt
    drain_ms: float
    verify_ms: float
