"""Revisions, ids, durations and messages as terminal text.

Text is never parsed as markup: names and failures come from outside and may contain brackets.
"""

from __future__ import annotations

from zlib import crc32

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

# Light enough for dark terminals, dark enough for light ones; red is left to failures.
PALETTE = ("cyan", "magenta", "green", "yellow", "blue", "orange3", "purple", "turquoise4")
_SHORT_ID = 6


def revision_style(revision: str) -> str:
    """The same colour for the same text, in every process (`hash` is salted, a checksum is not)."""
    return PALETTE[crc32(revision.encode()) % len(PALETTE)]


def revision_text(revision: str) -> Text:
    return Text(revision, style=revision_style(revision))


class RevisionCell:
    """A revision that loses letters of its name, not of its digest, where the column is narrow."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self.name, self.at, self.digest = revision.rpartition("@")

    def shortened(self, width: int) -> str:
        if len(self.revision) <= width:
            return self.revision
        tail = self.at + self.digest
        kept = width - len(tail) - 1
        if not self.at or kept < 0:
            return self.revision[: max(width - 1, 0)] + "…"
        return f"{self.name[:kept]}…{tail}"

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        least = len(self.at + self.digest) + 1 if self.at else 1
        return Measurement(min(least, len(self.revision)), len(self.revision))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.shortened(options.max_width), style=revision_style(self.revision))


def short_ids(ids: list[str]) -> dict[str, str]:
    """Each id → the first characters of its last segment, as many as make them different."""
    tails = {id: id.rpartition("#")[2] or id for id in ids}
    longest = max((len(tail) for tail in tails.values()), default=0)
    for length in range(_SHORT_ID, max(longest, _SHORT_ID) + 1):
        short = {id: tail[:length] for id, tail in tails.items()}
        if len(set(short.values())) == len(short):
            return short
    return {id: id for id in ids}


def one_line(text: str) -> str:
    return " ".join(text.split())


def duration(ms: float) -> str:
    """Milliseconds, in the unit that suits them."""
    if ms < 1:
        return f"{ms * 1000:.0f} µs"
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"
