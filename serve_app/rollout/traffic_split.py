"""The traffic split: canary or stable, for a request that names no revision.

Each replica applies it for a `shared` canary, the request router for a `dedicated` one.
"""

from __future__ import annotations

import hashlib

from serve_app.rollout.state import Traffic

_GOLDEN = 0.6180339887498949  # its multiples spread evenly over [0, 1): n of them, any n


class TrafficSplit:
    """Requests with a session are split by its hash: a larger weight only adds sessions.

    The others follow a low-discrepancy sequence: after n requests the share is right to about
    1 / n, where random choice is off by 1 / sqrt(n). `start`: the sequence's start, in [0, 1).
    """

    def __init__(self, *, start: float) -> None:
        self._at = start

    def to_canary(self, traffic: Traffic, session: str | None) -> bool:
        if session is not None:
            return session_position(session, traffic.canary) * 100 < traffic.weight
        self._at = (self._at + _GOLDEN) % 1.0
        return self._at * 100 < traffic.weight


def session_position(session: str, canary: str) -> float:
    """A number in [0, 1) that is the same in every process.

    It differs between canaries, so that not the same users come first each time.
    """
    digest = hashlib.blake2b(f"{canary}\n{session}".encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest) >> 11
    ) / 2**53  # 53 bits, as many as a float has, so that it is never 1
