"""Request statistics of one canary step on one replica, per revision.

The engine records every request that ends. The replica sends all of them with each of its reports.
Numbers only grow within a canary step, so a lost report costs nothing. Lists are uniform samples
of at most `SAMPLES` values.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve_app.wire.errors import DeadlineExceeded, EngineStopped, GenerationFailed
from serve_app.wire.request_stats import SAMPLES, RequestStats


@dataclass(slots=True, kw_only=True)
class Recording:
    """One request while it runs. Times are on `time.perf_counter`'s clock.

    Attributes:
        step_id: the canary step in which it arrived; None: it is not counted.
        revision: the key of its revision; None until it is admitted.
        chosen: the engine chose the revision; the request named none.
        tokens: generated so far, by all its generations.
        first_at: time of the first token of any generation.
    """

    step_id: str | None
    arrived: float = field(default_factory=time.perf_counter)
    revision: str | None = None
    chosen: bool = False
    tokens: int = 0
    first_at: float | None = None

    def add(self, tokens: int, first_at: float | None) -> None:
        self.tokens += tokens
        if first_at is not None:
            self.first_at = min(first_at, self.first_at or first_at)


class RequestRecorder:
    """The request statistics of the current canary step; none are kept outside of one.

    Attributes:
        step_id: of the current canary step, or None.
        request_stats: by revision key.
    """

    def __init__(self, chance: random.Random | None = None) -> None:
        """`chance` chooses the samples."""
        self.step_id: str | None = None
        self.request_stats: dict[str, RequestStats] = {}
        self._random = chance or random.Random(0)
        self._offered: Counter[tuple[str, str]] = Counter()  # values, by revision and list

    def start_step(self, step_id: str | None) -> None:
        """Starts with empty statistics, unless `step_id` is the current canary step."""
        if step_id != self.step_id:
            self.step_id, self.request_stats = step_id, {}
            self._offered.clear()

    @contextmanager
    def request(self, step_id: str | None) -> Iterator[Recording]:
        """Records the outcome of a request that was admitted.

        Refused and cancelled requests are not counted: they are not the revision's fault.
        """
        recording = Recording(step_id=step_id)
        try:
            yield recording
        except (DeadlineExceeded, EngineStopped, GenerationFailed):
            self._record(recording, failed=True)
            raise
        else:
            self._record(recording, failed=False)

    def _record(self, request: Recording, *, failed: bool) -> None:
        if request.revision is None:
            return
        first_at = request.first_at
        self.record(
            request.revision,
            step_id=request.step_id,
            chosen=request.chosen,
            failed=failed,
            latency_s=time.perf_counter() - request.arrived,
            first_token_s=None if first_at is None else first_at - request.arrived,
            tokens=request.tokens,
        )

    def record(
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
        """Records a request that has ended, unless it arrived in another canary step.

        Args:
            revision: the key of the revision that it ran on.
            step_id: the canary step in which it arrived; None: it is not counted.
            chosen: the engine chose the revision; the request named none.
            failed: its times are not sampled.
            latency_s: from arrival to the last token.
            first_token_s: from arrival to the first token.
            tokens: of all its choices.
        """
        if step_id is None or step_id != self.step_id:
            return
        stats = self.request_stats.setdefault(revision, RequestStats())
        stats.requests += 1
        stats.errors += failed
        stats.chosen += chosen
        if failed:
            return  # the time until a failure is no latency
        self._sample(revision, "latency_s", latency_s)
        if first_token_s is not None:
            self._sample(revision, "first_token_s", first_token_s)
            if tokens > 1 and latency_s > first_token_s:
                rate = (tokens - 1) / (latency_s - first_token_s)
                self._sample(revision, "tokens_per_s", rate)

    def _sample(self, revision: str, name: str, value: float) -> None:
        values: list[float] = getattr(self.request_stats[revision], name)
        self._offered[revision, name] += 1  # not the requests: some have no such value
        if len(values) < SAMPLES:
            values.append(value)
        elif (at := self._random.randrange(self._offered[revision, name])) < SAMPLES:
            values[at] = value
