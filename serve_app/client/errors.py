"""The errors that the Python client raises.

Exception
├── RequestRejected     the server answered and rejected the request; `code` is stable
├── ServerUnreachable   no hotswap server answered
└── TimeoutError        `HotswapClient.wait` ran out of time; the rollout goes on
"""

from __future__ import annotations


class RequestRejected(Exception):
    """The server rejected the request.

    Attributes:
        status: the HTTP status.
        code: stable, for programs, such as `rollout_not_found`.
        message: one sentence, for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"the server rejected the request ({self.status} {self.code}): {self.message}"


class ServerUnreachable(Exception):
    """No hotswap server answered at `base_url`: a closed port, a proxy, or another program."""

    def __init__(self, base_url: str, why: str) -> None:
        super().__init__(base_url, why)
        self.base_url = base_url
        self.why = why

    def __str__(self) -> str:
        return f"cannot reach the server at {self.base_url}: {self.why}"
