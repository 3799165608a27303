"""Finds stop strings in a text that is generated piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts the text of one choice before its first stop string.

    Text that may be the start of a stop string is held back. The stop string that is complete
    first ends the text; of two that are complete at once, the longer one. The result does not
    depend on the pieces into which the text is cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(stop) for stop in stops]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Adds text. Returns the text that can be sent now; empty once a stop string was found."""
        if self.found or not self._stops:
            return "" if self.found else text
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = [len(stop.text) for stop in self._stops if stop.advance(char)]
            if complete:
                self.found, self._held = True, ""
                return seen[: end - max(complete)]
        certain = len(seen) - max(stop.matched for stop in self._stops)
        self._held = seen[certain:]
        return seen[:certain]

    def rest(self) -> str:
        """Returns the text that is held back, for a text that ends without a stop string."""
        text, self._held = self._held, ""
        return text


class _Stop:
    """One stop string, and the number of its characters at the end of the text.

    Knuth, Morris, Pratt: Fast Pattern Matching in Strings, 1977.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._back = [0] * len(text)  # after a mismatch: the next shorter match
        for end in range(1, len(text)):
            self._back[end] = self._next(self._back[end - 1], text[end])

    def advance(self, char: str) -> bool:
        """Adds a character. Returns True if it completes the stop string."""
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.text)

    def _next(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._back[matched - 1]
        return matched + (self.text[matched] == char)
