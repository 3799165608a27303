"""The time of a swap from disk, step by step."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from hotswap_lib import Slot, image, pack, source

# The steps of a swap from disk, and the function of each: private ones too, because a single step
# has no public function. A name that no longer exists fails at once.
STEPS: tuple[tuple[str, Any, str], ...] = (
    ("read and parse the file", source, "_read_adapter"),
    ("of which: identify (BLAKE3)", source, "revision_of"),
    ("check against the layout", image, "fit"),
    ("write the image", image, "_write"),
    ("check that all is finite", image, "_check_finite"),
    ("stage", Slot, "stage"),
    ("commit", Slot, "commit"),
)


def breakdown(slot: Slot, paths: list[Path], *, rounds: int) -> dict[str, float]:
    """Step → its median microseconds in a swap from disk."""
    times: dict[str, list[float]] = {step: [] for step, _, _ in STEPS}
    with contextlib.ExitStack() as stack:
        for step, owner, name in STEPS:
            timed = _timed(getattr(owner, name), times[step])
            stack.enter_context(mock.patch.object(owner, name, timed))
        for turn in range(rounds):
            slot.commit(slot.stage(pack(paths[turn % len(paths)], slot.layout)))
    leaving = [_timed_us(lambda: pack(paths[0], slot.layout).digest) for _ in range(rounds)]
    within = [_timed_us(lambda: pack(paths[0], slot.layout)) for _ in range(rounds)]
    medians = {step: statistics.median(values) for step, values in times.items()}
    digest = statistics.median(leaving) - statistics.median(within)
    return {**medians, "digest, if the image leaves its process": digest}


def _timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter_ns()
        try:
            return function(*args, **kwargs)
        finally:
            times.append((time.perf_counter_ns() - started) / 1e3)

    return call


def _timed_us(operation: Callable[[], object]) -> float:
    times: list[float] = []
    _timed(operation, times)()
    return times[0]
