"""The JSON of `/admin/*` as types.

At the HTTP boundary: the controller fills these views from its state, the gateway returns them as
they are, the client and the CLI parse them back.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class View(BaseModel):
    """A frozen document. An older client ignores the fields of a newer server."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class SwapView(View):
    """The durations of the phases of one swap on one replica."""

    revision: str
    in_flight: str = Field(default="drain", description="policy for running requests")
    fetch_ms: float = 0.0
    stage_ms: float = 0.0
    drain_ms: float = 0.0
    commit_us: float = 0.0
    verify_ms: float = 0.0
    copies: int = 0
    image_bytes: int = 0


class LaneView(View):
    """One revision that a replica runs requests on now."""

    revision: str | None = None
    running: int = 0


class StartView(View):
    """The start of a replica, before its first revision."""

    load_s: float
    warm_up_s: float
    compiled_regions: int = 0
    compile_cache: Literal["off", "hit", "miss"] = "off"


class ReplicaView(View):
    """One live replica, as it last reported itself."""

    id: str
    revision: str | None = Field(description="for requests that name none, as name@digest8")
    serves: list[str] = Field(
        default=[], description="that one first, then loaded adapters and a shared canary"
    )
    lanes: list[LaneView] = []
    assigned: str = Field(description="the revision that the controller has assigned")
    staged: str | None = None
    serving: bool = False
    running: int = Field(default=0, description="requests in generation when it last reported")
    recompiles: int = Field(default=0, description="compilations since warm-up")
    limit_hits: int = Field(default=0, description="frames that fell back to eager since warm-up")
    failure: str | None = None
    last_swap: SwapView | None = None
    start: StartView | None = None
    last_seen_s: float = Field(default=0.0, description="seconds since its last report")
    pid: int | None = None
    node: str | None = None


class MeasurementView(View):
    """One check, probe score or query of an analysis. Times are in seconds."""

    name: str
    outcome: str = Field(description="'pass', 'fail' or 'inconclusive'")
    why: str
    canary: float | None = None
    stable: float | None = None
    canary_samples: int | None = None
    stable_samples: int | None = None


class VerdictView(View):
    """The outcome of a canary step."""

    step: int = Field(description="counted from 0")
    weight: float
    outcome: str = Field(description="'pass', 'fail' or 'inconclusive'")
    at: float = Field(description="seconds since the epoch")
    share: float | None = Field(
        default=None, description="percent of the requests that the canary really got"
    )
    requests: int = Field(default=0, description="those that named no revision, in this step")
    measurements: list[MeasurementView] = []


class CanaryView(View):
    """The steps of a canary, and their verdicts."""

    placement: str
    step: int = Field(description="the current one, counted from 0; behind the last: all of it")
    steps: list[float] = Field(description="the weights, in percent")
    weight: float = Field(description="percent of the requests that it is to get now")
    share: float | None = Field(default=None, description="percent that it got, in this step")
    requests: int = Field(default=0, description="those that named no revision, in this step")
    pause: str | None = Field(default=None, description="'asked', 'step' or 'failure'")
    hold_until: float | None = None
    verdicts: list[VerdictView] = []
    latest: VerdictView | None = None


class RolloutView(View):
    """One rollout: its plan and its progress."""

    id: str
    target: str
    previous: str
    source: str | None = None
    strategy: str
    max_unavailable: int
    in_flight: str | None = Field(default=None, description="'drain' or 'overlap'")
    state: str
    reason: str | None = None
    canary: CanaryView | None = None
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

    ready: bool = Field(description="at least one replica lets requests in")
    epoch: int
    generation: int
    stable: str
    loaded: list[str] = Field(
        default=[], description="loaded adapters, for requests that name them"
    )
    rollout: RolloutView | None = None
    replicas: list[ReplicaView] = []
    history: list[str] = Field(default=[], description="stable revisions, newest last")
    journal_uri: str
    warnings: list[str] = []


class AdapterView(View):
    """One loaded adapter; vLLM's field names."""

    lora_name: str
    lora_path: str = Field(description="path, Hub id or URI that it was loaded from")
    revision: str
    generation: int = Field(description="of the fleet, for the next `expected_generation`")
    ready: int = Field(default=0, description="replicas that serve it")
    total: int = Field(default=0, description="live replicas")


class AdapterList(View):
    """`GET /v1/lora_adapters`: in the order in which they were loaded."""

    data: list[AdapterView]
    generation: int


class Body(BaseModel):
    """The body of a request. Unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class LoadAdapter(Body):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    expected_generation: int | None = None


class UnloadAdapter(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    expected_generation: int | None = None


class ErrorDetail(View):
    """OpenAI's error object; `code` is stable, `message` is one sentence for people."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str


class ErrorBody(View):
    error: ErrorDetail
