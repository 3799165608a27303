"""A fleet and its rollout as views, and how they look in a terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType

from serve_app.wire.admin import (
    CanaryView,
    FleetView,
    MeasurementView,
    ReplicaView,
    RolloutView,
    SwapView,
    VerdictView,
)

OLD = "pirate@3f2a9c1d"

NEW = "terse-json-speaker@9b1c22aa"
SWAP = SwapView(revision=NEW, stage_ms=12.4, commit_us=184)

ROLLOUT = RolloutView(
    id="r-0007",
    target=NEW,
    previous=OLD,
    strategy="rolling",
    max_unavailable=1,
    state="progressing",
    total=2,
    staged=2,
    committed=1,
    created_at=1.0,
)

FLEET = FleetView(
    ready=True,
    epoch=3,
    generation=17,
    stable=OLD,
    rollout=ROLLOUT,
    replicas=[
        ReplicaView(
            id="default#Model#k3j9x0ab",
            revision=NEW,
            assigned=NEW,
            serving=True,
            running=3,
            last_swap=SWAP,
        ),
        ReplicaView(id="default#Model#q81mz2cd", revision=OLD, assigned=OLD, staged=NEW),
    ],
    history=["base@00000000", OLD],
    journal_uri="/tmp/journal",
    warnings=["the journal is local"],
)

LOOK = VerdictView(
    step=0,
    weight=10,
    outcome="inconclusive",
    at=2.0,
    share=9.8125,
    requests=320,
    measurements=[
        MeasurementView(name="error_rate", outcome="pass", why="error_rate is 0.003"),
        MeasurementView(name="latency p95", outcome="inconclusive", why="31 of 50 [samples]"),
    ],
)

CANARY = ROLLOUT.model_copy(
    update={
        "strategy": "canary",
        "state": "paused",
        "reason": "step 1 of 2 waits to be promoted",
        "canary": CanaryView(
            placement="shared", step=0, steps=[10, 50], weight=10, pause="step", latest=LOOK
        ),
    }
)


def with_canary(**changed: object) -> RolloutView:
    assert CANARY.canary is not None
    return CANARY.model_copy(update={"canary": CANARY.canary.model_copy(update=changed)})


def drawn(picture: RenderableType, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(picture)
    return captured.get()
