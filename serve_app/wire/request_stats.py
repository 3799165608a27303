"""Request statistics of one revision, as replicas report them."""

from __future__ import annotations

from dataclasses import dataclass, field

SAMPLES = 1000  # the most that a plan's `min_samples` may ask for


PROBE = "hotswap.probe"  # the session of probe requests, which are not counted


@dataclass(slots=True, kw_only=True)
class RequestStats:
    """Of one revision. `chosen`: requests that named no revision. Times are in seconds.

    `latency_s`: from arrival to the last token. `first_token_s`: to the first one.
    `tokens_per_s`: between the first token and the last; of answers with two tokens or more.
    """

    requests: int = 0
    errors: int = 0
    chosen: int = 0
    latency_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)

    def __add__(self, other: RequestStats) -> RequestStats:
        """Both together."""
        return RequestStats(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            chosen=self.chosen + other.chosen,
            latency_s=self.latency_s + other.latency_s,
            first_token_s=self.first_token_s + other.first_token_s,
            tokens_per_s=self.tokens_per_s + other.tokens_per_s,
        )
