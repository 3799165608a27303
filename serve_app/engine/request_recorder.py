"""What became of the requests of one step_id, revision by revision, on one replica.

The engine writes a line for each request that leaves it; the control lane sends the whole with its
reports. Numbers only grow within a step_id, so a report that is lost costs nothing. Lists are samples
of at most `SAMPLES`: each request had the same chance to be in it.
"""

from __future__ import annotations

import random
from collections import Counter

from serve_app.wire.request_stats import SAMPLES, RequestStats


class RequestRecorder:
    """The request_stats of the current step_id; none are kept while there is none."""

    def __init__(self) -> None:
        self.step_id: str | None = None
        self.request_stats: dict[str, RequestStats] = {}
        self._random = random.Random(0)
        self._seen: Counter[tuple[str, str]] = Counter()  # by revision and list

    def open(self, step_id: str | None) -> None:
        """Begin with empty request_stats when this is another step_id."""
        if step_id != self.step_id:
            self.step_id, self.request_stats = step_id, {}
            self._seen.clear()

    def write(
        self,
        revision: str,
        *,
        step_id: str | None,
        chosen: bool,
        failed: bool,
        latency_s: float,
        first_token_s: float | None = None,
        tokens: int = 0,
    ) -> None:
        """One request that is over. `step_id`: the one it arrived in; another's does not count."""
        if step_id is None or step_id != self.step_id:
            return
        stats = self.request_stats.setdefault(revision, RequestStats())
        stats.requests += 1
        stats.errors += failed
        stats.chosen += chosen
        if failed:
            return  # how long it took to fail says nothing about answers
        self._sample(revision, "latency_s", latency_s)
        if first_token_s is not None:
            self._sample(revision, "first_token_s", first_token_s)
            if tokens > 1 and latency_s > first_token_s:
                rate = (tokens - 1) / (latency_s - first_token_s)
                self._sample(revision, "tokens_per_s", rate)

    def _sample(self, revision: str, which: str, value: float) -> None:
        values: list[float] = getattr(self.request_stats[revision], which)
        self._seen[revision, which] += 1  # not the requests: some have no such value
        if len(values) < SAMPLES:
            values.append(value)
        elif (at := self._random.randrange(self._seen[revision, which])) < SAMPLES:
            values[at] = value
