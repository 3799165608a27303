"""What became of the requests of one trial, revision by revision, on one replica.

The engine writes a line for each request that leaves it; the control lane sends the whole with its
reports. Numbers only grow within a trial, so a report that is lost costs nothing. Lists are samples
of at most `SAMPLES`: each request had the same chance to be in it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

SAMPLES = 1000  # as many as a plan may ask for, also of a canary on one replica
PROBE = "hotswap.probe"  # the session of requests that are not counted: nobody uses the answers


@dataclass(slots=True, kw_only=True)
class Tally:
    """Of one revision. `chosen`: requests that named none. Times are in seconds.

    `latency_s`: from arrival to the last token. `first_token_s`: to the first one.
    `tokens_per_s`: between the first token and the last; of answers with two tokens or more.
    """

    requests: int = 0
    errors: int = 0
    chosen: int = 0
    latency_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        """Both together; a sample that is full weighs no more than another one that is full."""
        return Tally(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            chosen=self.chosen + other.chosen,
            latency_s=self.latency_s + other.latency_s,
            first_token_s=self.first_token_s + other.first_token_s,
            tokens_per_s=self.tokens_per_s + other.tokens_per_s,
        )


class Ledger:
    """The tallies of the current trial; none are kept while there is none."""

    def __init__(self) -> None:
        self.trial: str | None = None
        self.tallies: dict[str, Tally] = {}
        self._random = random.Random(0)
        self._seen: Counter[tuple[str, str]] = Counter()  # by revision and list

    def open(self, trial: str | None) -> None:
        """Begin with empty tallies when this is another trial."""
        if trial != self.trial:
            self.trial, self.tallies = trial, {}
            self._seen.clear()

    def write(
        self,
        revision: str,
        *,
        trial: str | None,
        chosen: bool,
        failed: bool,
        latency_s: float,
        first_token_s: float | None = None,
        tokens: int = 0,
    ) -> None:
        """One request that is over. `trial`: the one it arrived in; another's does not count."""
        if trial is None or trial != self.trial:
            return
        tally = self.tallies.setdefault(revision, Tally())
        tally.requests += 1
        tally.errors += failed
        tally.chosen += chosen
        if failed:
            return  # how long it took to fail says nothing about answers
        self._sample(revision, "latency_s", latency_s)
        if first_token_s is not None:
            self._sample(revision, "first_token_s", first_token_s)
            if tokens > 1 and latency_s > first_token_s:
                rate = (tokens - 1) / (latency_s - first_token_s)
                self._sample(revision, "tokens_per_s", rate)

    def _sample(self, revision: str, which: str, value: float) -> None:
        values: list[float] = getattr(self.tallies[revision], which)
        self._seen[revision, which] += 1  # not the requests: some have no such value
        if len(values) < SAMPLES:
            values.append(value)
        elif (at := self._random.randrange(self._seen[revision, which])) < SAMPLES:
            values[at] = value
