"""Canaries on a running fleet: start one, follow it, see which revision each request got."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from serve_app.rollout.analysis import Analysis, Limits, Probe
from serve_app.rollout.plan import CanaryStep, Placement, Plan
from serve_app.wire.admin import CanaryView, RolloutView

from .fleet import Fleet, Load, eventually

OPEN = (CanaryStep(weight=10, hold="manual"), CanaryStep(weight=50, hold="manual"))


def golden(fleet: Fleet, folder: Path) -> Path:
    """Questions, and what the stable revision answers to them."""
    file = folder / "golden.jsonl"
    prompts = [f"golden {i}" for i in range(4)]
    bodies = [{"prompt": p, "max_tokens": 6, "temperature": 0} for p in prompts]
    answers = [fleet.post(body).json()["choices"][0]["text"] for body in bodies]
    pairs = zip(prompts, answers, strict=True)
    file.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in pairs))
    return file


def canary(fleet: Fleet, name: str, **plan: Any) -> RolloutView:
    given = {"strategy": "canary", "steps": OPEN} | plan
    return fleet.client.start(Plan(adapter=str(fleet.world.adapter(name)), **given))


def at_step(fleet: Fleet, id: str, step: int) -> CanaryView:
    """The canary once every replica does its part in the step, which waits to be promoted."""

    def there() -> CanaryView | None:
        view = fleet.client.rollout(id)
        assert not view.ended, view
        found = view.canary
        return found if found and (found.step, found.pause) == (step, "step") else None

    found: CanaryView = eventually(there, what=f"step {step}")
    return found


def ended(fleet: Fleet, id: str) -> RolloutView:
    return fleet.client.wait(id, timeout_s=120)


def revisions(fleet: Fleet, sessions: list[str | None]) -> list[str]:
    """The revision that each of these requests got, many at once."""
    with (
        httpx.Client(base_url=fleet.url, timeout=120) as http,
        ThreadPoolExecutor(16) as pool,
    ):

        def ask(session: str | None) -> str:
            body = {"prompt": "x", "max_tokens": 1, "temperature": 0}
            headers = {} if session is None else {"x-session-id": session}
            response = http.post("v1/completions", json=body, headers=headers)
            response.raise_for_status()
            return response.headers["x-adapter-revision"]

        return list(pool.map(ask, sessions))


def check_sessions_and_pins(fleet: Fleet, placement: Placement) -> None:
    """Sessions stay on their side while the weight grows, and only join. Pins are kept."""
    rollout = canary(fleet, "gamma", placement=placement)
    sessions: list[str | None] = [f"user {i}" for i in range(60)]
    members: list[set[str | None]] = []
    for step, many in enumerate((range(1, 20), range(15, 50))):
        at_step(fleet, rollout.id, step)

        def on_canary() -> set[str | None]:
            got = zip(sessions, revisions(fleet, sessions), strict=True)
            return {session for session, revision in got if revision == rollout.target}

        def settled(many: range = many) -> set[str | None] | None:
            """The router sees a new weight up to a second late."""
            once, again = on_canary(), on_canary()
            return once if once == again and len(once) in many else None

        members.append(eventually(settled, what="the same sessions on the canary"))
        if step == 0:
            fleet.client.promote(rollout.id)
    assert members[0] < members[1]
    pins = [rollout.target, rollout.previous]
    for pin in pins:
        body = {"prompt": "x", "max_tokens": 1, "model": f"tiny:{pin}"}
        assert fleet.post(body).headers["x-adapter-revision"] == pin
        body = {"prompt": "x", "max_tokens": 1}
        answer = fleet.post(body, headers={"x-adapter-revision": pin})
        assert answer.headers["x-adapter-revision"] == pin
    fleet.client.abort(rollout.id)
    assert ended(fleet, rollout.id).state == "aborted"


def check_garbage_is_taken_back(
    fleet: Fleet, folder: Path, placement: Placement, *, replicas: int
) -> None:
    """A canary whose answers a probe finds wrong is aborted at its first step, under load."""
    stable = fleet.settle(replicas=replicas).stable
    agrees = Probe(
        function="serve_app.probes:agreement",
        options={"file": str(golden(fleet, folder)), "max_tokens": 6},
        scores={"gain": Limits(min=-0.1)},
    )
    with Load(fleet, clients=6) as load:
        load.wait_for(10)
        rollout = canary(
            fleet,
            "gamma",
            placement=placement,
            analysis=Analysis(probes=(agrees,), interval=0.3),
            steps=(CanaryStep(weight=10, hold=60.0), CanaryStep(weight=50)),
        )
        rollout = ended(fleet, rollout.id)
        load.wait_for(20)
    assert rollout.state == "aborted", rollout
    assert rollout.reason is not None
    assert "step 1 failed its analysis: serve_app.probes:agreement gain is -1" in rollout.reason
    view = fleet.settle(replicas=replicas)
    assert {tuple(replica.serves) for replica in view.replicas} == {(stable,)}
    assert load.failures == []
    assert load.mismatched() == []
    assert rollout.canary is not None
    assert [(each.step, each.outcome) for each in rollout.canary.verdicts] == [(0, "fail")]
