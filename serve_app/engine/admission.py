"""Admission control: the gate that makes a drain exact.

A request counts as running from before its revision is read until after its last token. While the
gate is closed, new requests wait; none is refused. So when the gate is closed and no request is
running, the weights can change without any request noticing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class DrainTimeout(Exception):
    """Requests were still running after the drain timeout; the gate is as it was before."""

    code = "drain_timeout"

    def __init__(self, running: int, timeout_s: float) -> None:
        super().__init__(running, timeout_s)
        self.running, self.timeout_s = running, timeout_s

    def __str__(self) -> str:
        return f"{self.running} requests were still running after {self.timeout_s:g} s of drain"


class Admission:
    """Counts running requests and holds back new ones while closed. Starts closed.

    For one event loop; not thread-safe.
    """

    def __init__(self) -> None:
        self.running = 0
        self._open = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    async def enter(self) -> None:
        """Waits until the gate is open, then counts as running. Pair with `leave`."""
        while not self.is_open:
            await self._open.wait()
        self.running += 1
        self._empty.clear()

    def leave(self) -> None:
        self.running -= 1
        if self.running == 0:
            self._empty.set()

    @asynccontextmanager
    async def drained(self, *, timeout_s: float) -> AsyncIterator[None]:
        """Closes the gate and waits until no request is running. Afterwards it is as before.

        Raises:
            DrainTimeout: after `timeout_s` seconds.
        """
        was_open = self.is_open
        self.close()
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._empty.wait()
            except TimeoutError:
                raise DrainTimeout(self.running, timeout_s) from None
            yield
        finally:
            if was_open:
                self.open()
