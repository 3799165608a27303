"""The release scripts of examples/, as a job would run them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples import canary_release, feature_flag, nightly_update

from .conftest import free_port
from .fleet import Fleet, Load, eventually

UNDER_LOAD = pytest.mark.usefixtures("load")


@pytest.fixture
def load(fleet: Fleet) -> Iterator[Load]:
    with Load(fleet, clients=3) as running:
        running.wait_for(5)
        yield running
    assert running.failures == []
    assert running.mismatched() == []


def golden(fleet: Fleet, folder: Path, name: str) -> str:
    """Questions, and what an adapter of the world answers to them."""
    prompts = ["golden 0", "golden 1"]
    fleet.client.load_adapter("teacher", str(fleet.world.adapter(name)))
    answers = [
        fleet.post({"model": "teacher", "prompt": p, "max_tokens": 64, "temperature": 0}).json()
        for p in prompts
    ]
    fleet.client.unload_adapter("teacher")
    lines = [
        json.dumps({"prompt": prompt, "answer": answer["choices"][0]["text"]})
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    file = folder / "golden.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


def rollout_ids(fleet: Fleet) -> set[str]:
    return {rollout.id for rollout in fleet.client.rollouts().data}


def release(fleet: Fleet, adapter: str, *more: str) -> int:
    quick = ["--hold", "500ms", "--min-samples", "2", "--url", fleet.url]
    return canary_release.main([adapter, *quick, *more])


@UNDER_LOAD
def test_a_release_is_promoted_or_taken_back_by_what_it_answers(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beta, gamma = (str(fleet.world.adapter(name)) for name in ("beta", "gamma"))
    right = golden(fleet, tmp_path, "beta")
    assert release(fleet, beta, "--golden", right, "--release", "v2") == 0
    said = capsys.readouterr().out
    assert "step 1, 10 %: pass" in said
    assert "step 2, 50 %: pass" in said
    assert "agreement gain is 1" in said
    assert fleet.client.fleet().stable == fleet.world.revision("beta")
    # the job lost its connection and runs again: the same rollout, and nothing new
    rollouts = rollout_ids(fleet)
    assert release(fleet, beta, "--golden", right, "--release", "v2") == 0
    assert rollout_ids(fleet) == rollouts
    assert release(fleet, gamma, "--golden", right) == 3
    said = capsys.readouterr().out
    assert "step 1, 10 %: fail" in said
    assert "agreement gain is -1, and has to be at least -0.02" in said
    assert fleet.settle(replicas=2).stable == fleet.world.revision("beta")


def test_a_release_that_is_refused_or_finds_nobody_says_so(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert release(fleet, str(tmp_path / "nothing")) == 1
    assert "[adapter_not_found]" in capsys.readouterr().err
    away = f"http://127.0.0.1:{free_port()}"
    assert canary_release.main(["x", "--url", away]) == 4
    assert "cannot reach the server" in capsys.readouterr().err


@UNDER_LOAD
def test_the_nightly_update_takes_the_newest_adapter_once(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for night, name in (("2026-11-01", "alpha"), ("2026-11-02", "gamma")):
        shutil.copytree(fleet.world.adapter(name), tmp_path / night)
    before = rollout_ids(fleet)
    for _ in range(2):
        assert nightly_update.main([str(tmp_path), "--url", fleet.url]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(": succeeded")
    assert said[1].endswith("is not new; nothing was started")
    assert len(rollout_ids(fleet) - before) == 1
    digest = fleet.world.revision("gamma").rpartition("@")[2]
    assert fleet.client.fleet().stable == f"2026-11-02@{digest}"
    assert nightly_update.main([str(tmp_path / "2026-11-01"), "--url", fleet.url]) == 1


@UNDER_LOAD
def test_a_feature_flag_decides_how_far_a_canary_goes(fleet: Fleet, tmp_path: Path) -> None:
    flag = tmp_path / "flag.json"

    def turn(value: float) -> None:
        flag.write_text(json.dumps({"beta": value}))

    def weight() -> float | None:
        running = fleet.client.fleet().rollout
        canary = running.canary if running else None
        return canary.weight if canary and canary.pause == "step" else None

    def follow(name: str = "beta") -> int:
        adapter = str(fleet.world.adapter(name))
        words = ["--flag", str(flag), "--name", "beta", "--url", fleet.url, "--every", "0.1"]
        return feature_flag.main([adapter, *words])

    stable = fleet.client.fleet().stable
    for last, code in ((0, 3), (100, 0)):
        turn(0)
        with ThreadPoolExecutor(1) as pool:
            script = pool.submit(follow)
            turn(5)
            eventually(lambda: weight() == 5, what="5 %")
            turn(25)
            eventually(lambda: weight() == 25, what="25 %")
            turn(last)
            assert script.result(timeout=60) == code
    after = fleet.settle(replicas=2).stable
    assert (stable != after, after) == (True, fleet.world.revision("beta"))
