"""Canaries on two replicas: promoted by what they answer, or taken back; sessions and pins."""

from __future__ import annotations

from pathlib import Path

from serve_app.rollout.analysis import Analysis, Check, Limits, Probe
from serve_app.rollout.plan import CanaryStep

from .canaries import canary, check_garbage_is_taken_back, check_sessions_and_pins, ended
from .fleet import Fleet, Load

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
    check_garbage_is_taken_back(fleet, tmp_path, "shared", replicas=REPLICAS)


def test_sessions_stay_and_only_join_and_pins_are_kept(fleet: Fleet) -> None:
    check_sessions_and_pins(fleet, "shared")
