"""The compile guard: after warm-up, nothing may be compiled and no recompile limit may be hit.

The only file that reads private state of torch. Dynamo keeps process-wide counters, whichever
thread compiles: ``stats/unique_graphs`` grows with every graph, the first one of a function
included, and every fallback to eager because of a recompile limit leaves its message under
``unimplemented``. tests/hotswap_lib/test_guard.py fails when torch moves either of them.
"""

from __future__ import annotations

from .errors import RecompiledAfterWarmup

_LIMIT_MESSAGE = "recompile limit exceeded"


class CompileGuard:
    """Counts compilations in this process from `arm` on.

    Example:
        ``guard = CompileGuard()``; warm up; ``guard.arm()``; serve; ``guard.check()``.
    """

    def __init__(self) -> None:
        self.arm()

    def arm(self) -> None:
        """Start counting from here; also the way to forgive what was counted so far."""
        self._graphs_before, self._limits_before = _compiled_graphs(), _limit_hits()

    @property
    def recompiles(self) -> int:
        """Graphs compiled since `arm`; the first compilation of a function counts as well."""
        return max(0, _compiled_graphs() - self._graphs_before)

    @property
    def limit_hits(self) -> int:
        """Functions that fell back to eager since `arm`, because a recompile limit was hit."""
        return max(0, _limit_hits() - self._limits_before)

    def check(self) -> None:
        """Raise if anything was compiled.

        Raises:
            RecompiledAfterWarmup: with both counts.
        """
        recompiles, limit_hits = self.recompiles, self.limit_hits
        if recompiles or limit_hits:
            raise RecompiledAfterWarmup(recompiles, limit_hits)


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _limit_hits() -> int:
    from torch._dynamo.utils import counters

    # list(): another thread may compile, and count, while this one reads
    messages = list(counters["unimplemented"].items())
    return sum(count for message, count in messages if _LIMIT_MESSAGE in message)
