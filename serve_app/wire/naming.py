"""Revisions as text: what requests call them, and what the rollout machine does.

Apart from `hotswap_lib.Revision`, because whoever routes a request must not need torch.
"""

from __future__ import annotations


def is_called(key: str, pin: str) -> bool:
    """Whether `pin` is `name`, `name@digest8` or all of `key`, which is `name@<64 hex>`."""
    name, _, digest = key.rpartition("@")
    return pin in (name, f"{name}@{digest[:8]}", key)
