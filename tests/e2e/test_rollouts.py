"""Swaps on a live fleet: exact, without a failed request, over HTTP, CLI and handle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray import serve

from hotswap_lib import AdapterRefused
from serve_app.client import RequestRejected
from serve_app.rollout.plan import InFlight, Plan

from .bad_adapters import BAD, make_bad
from .fleet import Fleet, Load

ROOT = Path(__file__).parents[2]


def hotswap(fleet: Fleet, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line, as a user runs it."""
    command = [sys.executable, "-m", "serve_app.client.cli", "--url", fleet.url, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("in_flight", ["overlap", "drain"])
def test_a_rolling_swap_under_load_answers_every_request_with_the_revision_it_names(
    fleet: Fleet, in_flight: InFlight
) -> None:
    with Load(fleet, clients=6) as load:
        load.wait_for(10)
        for name in ("beta", "gamma", "alpha"):
            revision = fleet.roll(name, in_flight=in_flight)
            load.wait_for(10)
            assert revision == fleet.world.revision(name)
    assert load.failures == []
    assert load.mismatched() == []
    assert {fleet.world.revisions[a.revision] for a in load.answers} == {"alpha", "beta", "gamma"}
    view = fleet.settle(replicas=2)
    assert [r.last_swap.copies for r in view.replicas if r.last_swap] == [1, 1]
    assert [r.last_swap.in_flight for r in view.replicas if r.last_swap] == [in_flight] * 2


def test_all_at_once_reaches_every_replica(fleet: Fleet) -> None:
    revision = fleet.roll("gamma", strategy="all_at_once")
    assert {r.revision for r in fleet.settle(replicas=2).replicas} == {revision}


def test_base_is_a_revision_like_any_other(fleet: Fleet) -> None:
    ended = fleet.client.wait(fleet.client.start(Plan(adapter="base")).id, timeout_s=60)
    assert ended.state == "succeeded"
    answer = fleet.ask("no adapter")
    assert answer.revision.startswith("base@")
    assert fleet.is_exact(answer)


def test_undo_goes_back_and_a_second_undo_returns(fleet: Fleet) -> None:
    before = fleet.roll("alpha")
    after = fleet.roll("beta")
    assert fleet.client.wait(fleet.client.undo().id, timeout_s=60).target == before
    assert fleet.ask("undone").revision == before
    assert fleet.client.wait(fleet.client.undo().id, timeout_s=60).target == after
    assert fleet.is_exact(fleet.ask("again"))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_in_one_sentence_and_changes_nothing(
    fleet: Fleet, tmp_path: Path, kind: str
) -> None:
    live = fleet.roll("alpha")
    path = make_bad(kind, like=fleet.world.adapter("alpha"), folder=tmp_path)
    before = fleet.client.fleet()

    with pytest.raises(RequestRejected) as refused:
        fleet.client.start(Plan(adapter=str(path)))

    assert refused.value.status == 400
    assert refused.value.code == BAD[kind][1]
    assert kind in refused.value.message  # the adapter's name
    assert "\n" not in refused.value.message
    after = fleet.client.fleet()
    assert after.generation == before.generation
    assert {r.revision for r in after.replicas} == {live}
    answer = fleet.ask("still here")
    assert answer.revision == live
    assert fleet.is_exact(answer)


def test_a_refusal_names_adapter_tensor_and_rule_on_the_command_line(
    fleet: Fleet, tmp_path: Path
) -> None:
    path = make_bad("nan", like=fleet.world.adapter("alpha"), folder=tmp_path)
    done = hotswap(fleet, "rollout", "start", "--adapter", str(path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "'nan'" in done.stderr
    assert "lora_" in done.stderr
    assert "[non_finite]" in done.stderr


def test_a_refusal_arrives_typed_through_a_handle(fleet: Fleet, tmp_path: Path) -> None:
    path = make_bad("no_lora_b", like=fleet.world.adapter("alpha"), folder=tmp_path)
    controller = serve.get_deployment_handle("RolloutController", fleet.app)
    with pytest.raises(AdapterRefused) as refused:
        controller.start_rollout.remote({"adapter": str(path)}).result(timeout_s=60)
    assert refused.value.code == "missing_tensor"


def test_the_command_line_rolls_watches_and_undoes(fleet: Fleet) -> None:
    fleet.roll("alpha")
    adapter = str(fleet.world.adapter("gamma"))
    rolled = hotswap(
        fleet, "rollout", "start", "--adapter", adapter, "--strategy", "rolling", "--watch"
    )
    assert rolled.returncode == 0, rolled
    assert fleet.ask("x").revision == fleet.world.revision("gamma")
    status = hotswap(fleet, "status")
    assert fleet.world.revision("gamma") in status.stdout
    assert hotswap(fleet, "undo", "--watch").returncode == 0
    assert fleet.ask("x").revision == fleet.world.revision("alpha")


def test_the_script_that_docs_rollouts_md_shows_runs(fleet: Fleet) -> None:
    script = ROOT / "examples" / "handles.py"
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "HOTSWAP_APP": fleet.app,
        "HOTSWAP_ADAPTER": str(fleet.world.adapter("beta")),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done
    assert fleet.world.revision("beta") in done.stdout
    assert fleet.ask("x").revision == fleet.world.revision("beta")
