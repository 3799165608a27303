"""A replica as the machine meets it: it receives documents, obeys step by step, and reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.rollout.events import Reported
from serve_app.rollout.state import Desired, Failure, ReplicaState


@dataclass(slots=True)
class FakeReplica:
    """What is true of one replica, told or not.

    `is_open`: it admits requests. It closes for the swap and for nothing else. `lost`: the fleet
    counted it as gone while it lived, so it may be anywhere until it serves again. `cannot`: what
    it fails to serve besides its default.
    """

    name: str
    holds: str | None = None
    staged: str | None = None
    is_open: bool = False
    alive: bool = True
    lost: bool = False
    doc: Desired | None = None
    failure: Failure | None = None
    gave_up: bool = False
    also_serves: set[str] = field(default_factory=set)
    cannot: set[str] = field(default_factory=set)

    def receive(self, doc: Desired) -> None:
        """Take a document, unless it is older than the one it acts on."""
        now = self.doc
        if now is None or (doc.epoch, doc.generation) >= (now.epoch, now.generation):
            self.doc, self.gave_up = doc, False

    @property
    def job(self) -> str | None:
        """The revision that it is at work on; None when it is as it shall be."""
        if self.doc is None or self.gave_up:
            return None
        if self.holds != self.doc.hold:
            return self.doc.hold
        return None if self.doc.stage in (None, self.holds, self.staged) else self.doc.stage

    def work(self) -> None:
        """One step of: stage, close, commit and open, serve the others, stage the next."""
        doc = self.doc
        if doc is None or self.gave_up:
            return
        if self.holds == doc.hold:
            self.is_open, self.failure = True, None
            self.also_serves = set(doc.also_serves) - self.cannot
            self.staged = None if doc.stage in (None, doc.hold) else doc.stage
        elif self.staged != doc.hold:
            self.staged = doc.hold
        elif self.is_open:
            self.is_open = False
        else:
            self.holds, self.is_open, self.failure = doc.hold, True, None

    def fail(self) -> None:
        """What it is at work on fails; what it held before goes on serving."""
        assert self.doc is not None
        assert self.job is not None
        self.failure = Failure(revision=self.job, reason="no luck", generation=self.doc.generation)
        self.is_open = self.holds is not None
        self.gave_up = True

    @property
    def refused(self) -> tuple[Failure, ...]:
        """The failures of those that it cannot serve besides its default."""
        doc = self.doc
        if doc is None or self.holds != doc.hold:
            return ()
        return tuple(
            Failure(revision=name, reason="no lane", generation=doc.generation)
            for name in doc.also_serves
            if name in self.cannot
        )

    def report(self, *, at: float) -> Reported:
        assigned = self.doc is not None and self.doc.hold == self.holds
        state = ReplicaState(
            holds=self.holds,
            staged=self.staged,
            serving=assigned and self.is_open,
            failure=self.failure,
            also_serves=tuple(sorted(self.also_serves - {self.holds})),
            refused=self.refused,
            traffic=None if self.doc is None else self.doc.traffic,
        )
        return Reported(replica=self.name, state=state, at=at)
