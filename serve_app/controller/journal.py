"""The journal: every decision of the controller, written before a replica receives it.

One small JSON document at `<state_uri>/journal.json`, replaced as a whole. Any fsspec URI works; on
a local disk the replacement is a rename, in an object store a single put, so a reader sees the old
document or the new one. The state of the replicas is not in it: they report it after a restart.

An epoch belongs to the controller that creates `<state_uri>/epochs/<number>`, which only one can.
A controller that finds a later epoch than its own there has been replaced. It looks before it
writes, and again before a replica receives the decision. So a controller that claims an epoch and
then reads the journal has read every decision that a replica can know of.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter

from serve_app.rollout.state import Fleet
from serve_app.wire.errors import Fenced

_FLEET = TypeAdapter(Fleet)
_SOURCES = TypeAdapter(dict[str, str])
_VERSION = 1
_KEPT = 100  # epoch numbers; one later number is enough to end an earlier epoch


class JournalUnreadable(Exception):
    """The journal exists but cannot be read; nothing was overwritten."""

    code = "journal_unreadable"

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"the journal {self.uri} cannot be read: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """The content of the journal.

    Attributes:
        declared: the adapter in the settings of that deploy.
        sources: revision → the path, Hub id or URI that it was accepted from.
    """

    fleet: Fleet
    declared: str | None
    sources: dict[str, str]


class Journal:
    """Reads and replaces one entry. Calls block on I/O: use a thread from async code."""

    def __init__(self, state_uri: str) -> None:
        self.uri = f"{state_uri.rstrip('/')}/journal.json"
        # an instance of its own: a transaction belongs to the instance, and threads share those
        self._fs, self._path = fsspec.url_to_fs(self.uri, skip_instance_cache=True)
        self._epochs = f"{self._path.rpartition('/')[0]}/epochs"
        self._mine: set[int] = set()  # claimed by this controller

    def read(self) -> JournalEntry | None:
        """The last entry, or None when none was written. Raises `JournalUnreadable`."""
        self._fs.invalidate_cache()  # of listings: another controller may have written it
        if not self._fs.exists(self._path):
            return None
        try:
            document: dict[str, Any] = json.loads(self._fs.cat_file(self._path))
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']} is not {_VERSION}")
            return JournalEntry(
                fleet=_FLEET.validate_python(document["fleet"]),
                declared=document["declared"],
                sources=_SOURCES.validate_python(document["sources"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise JournalUnreadable(self.uri, why) from error

    def epoch(self) -> int:
        """The latest epoch that was claimed; 0 if none was."""
        return max(self._claimed(), default=0)

    def claim(self, *, after: int) -> int:
        """Claims an epoch that is later than `after` and than every epoch claimed so far."""
        self._fs.makedirs(self._epochs, exist_ok=True)
        taken = self._claimed()
        epoch = max([after, *taken]) + 1
        while not self._create(epoch):
            epoch += 1
        self._mine.add(epoch)
        # not the last ones: a concurrent claim would find their numbers free
        for old in sorted(taken)[:-_KEPT]:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._epochs}/{old}")
        return epoch

    def set_aside(self) -> str:
        """Moves an unreadable journal away; returns its new path."""
        aside = f"{self._path}.unreadable-{time.time_ns()}"
        self._fs.mv(self._path, aside)
        return aside

    def write(self, entry: JournalEntry) -> None:
        """Replaces the entry. When this returns, a crash can no longer lose it.

        Raises `Fenced` when another controller has claimed a later epoch. It may have read this
        entry or the one before, so no replica may receive this one.
        """
        document = {
            "version": _VERSION,
            "declared": entry.declared,
            "sources": entry.sources,
            "fleet": _FLEET.dump_python(replace(entry.fleet, observed={}), mode="json"),
        }
        self.check(entry.fleet.epoch)
        self._fs.makedirs(self._path.rpartition("/")[0], exist_ok=True)
        # fsspec's transaction moves the file into place when the block ends without an error
        with self._fs.transaction, self._fs.open(self._path, "wb") as file:
            file.write(json.dumps(document, indent=1).encode())
        self.check(entry.fleet.epoch)

    def check(self, epoch: int) -> None:
        """Raises `Fenced` when another controller has claimed a later epoch than this one."""
        if (there := self.epoch()) > epoch and there not in self._mine:
            raise Fenced(epoch, there)

    def _claimed(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            there = self._fs.ls(self._epochs, detail=False)
        except FileNotFoundError:  # object stores have no empty folders
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in there)
        return [int(name) for name in names if name.isdigit()]

    def _create(self, epoch: int) -> bool:
        path = f"{self._epochs}/{epoch}"
        try:
            if isinstance(self._fs, LocalFileSystem):
                # its own `pipe_file` checks and then writes, which is not atomic
                self._fs.open(path, "xb").close()
            else:
                self._fs.pipe_file(path, b"", mode="create")
        except FileExistsError:
            return False
        return True
