"""Canaries on two replicas: promoted by what they answer, or taken back; sessions and pins."""

from __future__ import annotations

from pathlib import Path

from serve_app.rollout.analysis import Analysis, Check, Limits, Probe
from serve_app.rollout.plan import CanaryStep

from .canaries import at_step, canary, ended, golden, revisions
from .fleet import Fleet, Load, eventually

REPLICAS = 2


def test_a_good_adapter_is_promoted_step_by_step_under_load(fleet: Fleet, tmp_path: Path) -> None:
    target = fleet.world.revision("beta")
    likely = Probe(
        function="serve_app.probes:log_likelihood",
        options={"file": str(held_out(tmp_path))},
        scores={"canary": Limits(min=-100)},
    )
    analysis = Analysis(
        checks=(Check(metric="error_rate", max=0), Check(metric="latency", max=60)),
        probes=(likely,),
        min_samples=5,
        interval=0.3,
    )
    steps = tuple(CanaryStep(weight=weight, hold=1.0) for weight in (10, 50, 100))
    with Load(fleet, clients=6) as load:
        load.wait_for(20)
        rollout = ended(fleet, canary(fleet, "beta", steps=steps, analysis=analysis).id)
        load.wait_for(20)
    assert rollout.state == "succeeded", rollout
    assert load.failures == []
    assert load.mismatched() == []
    assert {r.revision for r in fleet.settle(replicas=REPLICAS).replicas} == {target}
    assert rollout.canary is not None
    verdicts = rollout.canary.verdicts
    assert [(each.step, each.outcome) for each in verdicts] == [(i, "pass") for i in range(3)]
    assert all(each.requests > 0 and each.share is not None for each in verdicts)
    assert all("log_likelihood" in each.measurements[2].name for each in verdicts)


def held_out(folder: Path) -> Path:
    file = folder / "held-out.txt"
    file.write_text("a line of text\nand another one\n")
    return file


def test_a_garbage_adapter_is_taken_back_at_its_first_step(fleet: Fleet, tmp_path: Path) -> None:
    stable = fleet.settle(replicas=REPLICAS).stable
    agrees = Probe(
        function="serve_app.probes:agreement",
        options={"file": str(golden(fleet, tmp_path)), "max_tokens": 6},
        scores={"gain": Limits(min=-0.1)},
    )
    with Load(fleet, clients=6) as load:
        load.wait_for(10)
        rollout = canary(
            fleet,
            "gamma",
            placement="shared",
            analysis=Analysis(probes=(agrees,), interval=0.3),
            steps=(CanaryStep(weight=10, hold=60.0), CanaryStep(weight=50)),
        )
        rollout = ended(fleet, rollout.id)
        load.wait_for(20)
    assert rollout.state == "aborted", rollout
    assert rollout.reason is not None
    assert "step 1 failed its analysis: serve_app.probes:agreement gain is -1" in rollout.reason
    view = fleet.settle(replicas=REPLICAS)
    assert {tuple(replica.serves) for replica in view.replicas} == {(stable,)}
    assert load.failures == []
    assert load.mismatched() == []
    assert rollout.canary is not None
    assert [(each.step, each.outcome) for each in rollout.canary.verdicts] == [(0, "fail")]


def test_sessions_stay_and_only_join_and_pins_are_kept(fleet: Fleet) -> None:
    rollout = canary(fleet, "gamma", placement="shared")
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
