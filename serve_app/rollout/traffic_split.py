"""Who gets the canary: the choice for one request that names no revision.

The same rule wherever it is made: in each replica for a `shared` canary (`serve_app.engine.engine`), where
requests are routed for a `dedicated` one (`serve_app.gateway.router`).
"""

from __future__ import annotations

import hashlib

from serve_app.rollout.state import Traffic

_GOLDEN = 0.6180339887498949  # its multiples spread evenly over [0, 1): n of them, any n


class TrafficSplit:
    """Requests with a session: by its hash, so the sessions on the canary only grow in number.

    The others: in weight_lock that spread evenly, so that after n requests the share is right to about
    1 / n, where a coin would be off by 1 / sqrt(n). `start`: where the weight_lock begin, in [0, 1).
    """

    def __init__(self, *, start: float) -> None:
        self._at = start

    def to_canary(self, traffic: Traffic, session: str | None) -> bool:
        if session is not None:
            return session_position(session, traffic.canary) * 100 < traffic.weight
        self._at = (self._at + _GOLDEN) % 1.0
        return self._at * 100 < traffic.weight


def session_position(session: str, canary: str) -> float:
    """A number in [0, 1) that every process agrees on; another one for another canary.

    Or the same unlucky users would be the first ones every time.
    """
    digest = hashlib.blake2b(f"{canary}\n{session}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # what a float can hold, so that it is never 1
