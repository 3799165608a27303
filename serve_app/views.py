"""What the admin surface shows: the JSON of `/admin/*`, as types.

Stands at the HTTP boundary. The controller fills these from its state, the gateway returns them as
they are, the client and the CLI parse them back. One definition, so no side can drift.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class View(BaseModel):
    """A frozen document. Unknown fields are ignored: an older client reads a newer server."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class SwapView(View):
    """How long the phases of one swap on one replica took."""

    revision: str
    fetch_ms: float = 0.0
    stage_ms: float = 0.0
    drain_ms: float = 0.0
    commit_us: float = 0.0
    verify_ms: float = 0.0
    copies: int = 0
    image_bytes: int = 0


class ReplicaView(View):
    """One live replica, as it last reported itself."""

    id: str
    revision: str | None = Field(description="what its weights hold, as name@digest8")
    assigned: str = Field(description="what the controller wants it to hold")
    staged: str | None = None
    serving: bool = False
    running: int = Field(default=0, description="requests in generation when it last reported")
    recompiles: int = Field(default=0, description="compilations since warm-up")
    limit_hits: int = Field(default=0, description="frames that fell back to eager since warm-up")
    failure: str | None = None
    last_swap: SwapView | None = None
    last_seen_s: float = Field(default=0.0, description="seconds since its last report")
    pid: int | None = None
    node: str | None = None


class RolloutView(View):
    """One rollout: what was asked, and how far it is."""

    id: str
    target: str
    previous: str
    source: str | None = None
    strategy: str
    max_unavailable: int
    state: str
    reason: str | None = None
    total: int = Field(default=0, description="live replicas that the rollout covers")
    staged: int = 0
    committed: int = 0
    created_at: float = Field(description="seconds since the epoch")
    ended_at: float | None = None
    converge_ms: float | None = Field(
        default=None, description="from the accepted request to the last replica's acknowledgement"
    )

    @property
    def ended(self) -> bool:
        return self.ended_at is not None


class RolloutList(View):
    """`GET /admin/rollouts`: newest first."""

    data: list[RolloutView]


class FleetView(View):
    """`GET /admin/fleet`: the whole fleet at one moment."""

    ready: bool = Field(description="at least one replica serves")
    epoch: int
    generation: int
    stable: str
    rollout: RolloutView | None = None
    replicas: list[ReplicaView] = []
    history: list[str] = Field(default=[], description="stable revisions, newest last")
    journal_uri: str
    warnings: list[str] = []


class ErrorDetail(View):
    """OpenAI's error object; `code` is stable, `message` is one sentence for people."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str


class ErrorBody(View):
    error: ErrorDetail
