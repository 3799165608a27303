"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """For one stream: lets text through up to the first stop string, which it swallows.

    Text that may be the start of a stop string is held back. The string that is complete first
    ends the text; of two that are complete at once, the longer one. It does not matter how the
    text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(stop) for stop in stops]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What of the text is certain now; may be empty. Nothing more once one is found."""
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
        """What was held back, when the text ends without a stop string."""
        text, self._held = self._held, ""
        return text


class _Stop:
    """One stop string and how much of it the text ends with (Knuth, Morris, Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._back = [0] * len(text)  # after a mismatch: the next shorter match to try
        for end in range(1, len(text)):
            self._back[end] = self._next(self._back[end - 1], text[end])

    def advance(self, char: str) -> bool:
        """Whether the string is complete with this character."""
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.text)

    def _next(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._back[matched - 1]
        return matched + (self.text[matched] == char)
