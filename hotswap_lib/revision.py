"""A revision: one immutable adapter, by name and digest. Needs no torch.

`hotswap_lib.digest` computes the digest from weights and configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from .errors import AdapterNameInvalid

_NAME = re.compile(r"[^\s@:\x00-\x1f\x7f]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHORT = 8  # hex characters of the digest in str()


@dataclass(frozen=True, slots=True)
class Revision:
    """One immutable adapter, shown as ``support-bot@3f2a9c1d``.

    Args:
        name: the name people use; not empty, no whitespace, control character, '@' or ':'.
        digest: 64 lower-case hex characters, from `hotswap_lib.digest`.

    Raises:
        AdapterNameInvalid: the name breaks the rule above.
        ValueError: the digest is not 64 hex characters.
    """

    name: str
    digest: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise AdapterNameInvalid(
                self.name, None, "a name is not empty and has no whitespace, '@' or ':' in it"
            )
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"a digest is 64 hex characters, not {self.digest!r}")

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:_SHORT]}"

    @property
    def key(self) -> str:
        """``name@<64 hex>``: the full text, which `parse` reads back."""
        return f"{self.name}@{self.digest}"

    @classmethod
    @lru_cache(maxsize=4096)  # a request router parses the keys of every replica at each request
    def parse(cls, key: str) -> Self:
        """The revision with this `key`.

        Raises:
            AdapterNameInvalid, ValueError: as the constructor.
        """
        name, _, digest = key.rpartition("@")
        return cls(name, digest)

    def matches(self, pin: str) -> bool:
        """True if `pin` is this revision's name, ``name@digest8``, or full key."""
        return pin in (self.name, str(self), self.key)


BASE = Revision("base", "0" * 64)
"""No adapter: the base model as it is."""
