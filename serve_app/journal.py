"""The journal: the controller's intent, written before anyone hears of it.

One small JSON document at `<state_uri>/journal.json`, replaced as a whole. Any fsspec URI works; on
a local disk the replacement is a rename, in an object store a single put, so a reader sees the old
document or the new one. What replicas hold is not in it: that is asked for again after a restart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import fsspec
from pydantic import TypeAdapter

from .rollout.state import Fleet

_FLEET = TypeAdapter(Fleet)
_SOURCES = TypeAdapter(dict[str, str])
_VERSION = 1


class JournalUnreadable(Exception):
    """The journal is there but cannot be understood; nothing was overwritten."""

    code = "journal_unreadable"

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"the journal {self.uri} cannot be read: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`declared`: the adapter in the settings of that deploy. `sources`: by revision."""

    fleet: Fleet
    declared: str | None
    sources: dict[str, str]


class Journal:
    """Reads and replaces one entry. Calls block on I/O: use a thread from async code."""

    def __init__(self, state_uri: str) -> None:
        self.uri = f"{state_uri.rstrip('/')}/journal.json"
        # an instance of its own: a transaction belongs to the instance, and threads share those
        self._fs, self._path = fsspec.url_to_fs(self.uri, skip_instance_cache=True)

    def read(self) -> Entry | None:
        """The last entry, or None when none was written. Raises `JournalUnreadable`."""
        if not self._fs.exists(self._path):
            return None
        try:
            document: dict[str, Any] = json.loads(self._fs.cat_file(self._path))
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']} is not {_VERSION}")
            return Entry(
                fleet=_FLEET.validate_python(document["fleet"]),
                declared=document["declared"],
                sources=_SOURCES.validate_python(document["sources"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise JournalUnreadable(self.uri, why) from error

    def write(self, entry: Entry) -> None:
        """Replace the entry. When this returns, a crash can no longer lose it."""
        document = {
            "version": _VERSION,
            "declared": entry.declared,
            "sources": entry.sources,
            "fleet": _FLEET.dump_python(replace(entry.fleet, observed={}), mode="json"),
        }
        self._fs.makedirs(self._path.rsplit("/", 1)[0], exist_ok=True)
        # fsspec's transaction moves the file into place when the block ends without an error
        with self._fs.transaction, self._fs.open(self._path, "wb") as file:
            file.write(json.dumps(document, indent=1).encode())
