"""The compile guard: after warm-up, no graph may be compiled and no recompile limit may be hit."""

from __future__ import annotations

from .errors import RecompiledAfterWarmup
from .torch_internals import compiled_graphs, recompile_limit_hits


class CompileGuard:
    """Counts compilations in this process, in any thread, since `arm`.

    Example:
        ``guard = CompileGuard()``; warm up; ``guard.arm()``; serve; ``guard.check()``.
    """

    def __init__(self) -> None:
        self.arm()

    def arm(self) -> None:
        """Count from now on. Compilations until now are forgotten."""
        self._graphs_before, self._limits_before = compiled_graphs(), recompile_limit_hits()

    @property
    def recompiles(self) -> int:
        """Graphs compiled since `arm`; the first compilation of a function counts as well."""
        return max(0, compiled_graphs() - self._graphs_before)

    @property
    def limit_hits(self) -> int:
        """Functions that fell back to eager since `arm`, because a recompile limit was hit."""
        return max(0, recompile_limit_hits() - self._limits_before)

    def check(self) -> None:
        """Raise if any graph was compiled, or any recompile limit was hit, since `arm`.

        Raises:
            RecompiledAfterWarmup: with both counts.
        """
        recompiles, limit_hits = self.recompiles, self.limit_hits
        if recompiles or limit_hits:
            raise RecompiledAfterWarmup(recompiles, limit_hits)
