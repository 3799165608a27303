"""`serve deploy` with a config file, and a fleet that grows while it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve

from .conftest import Cluster
from .fleet import Fleet
from .tiny_world import TinyWorld

SERVE = str(Path(sys.executable).with_name("serve"))
ROOT = Path(__file__).parents[2]


class Deploy:
    """Runs the command against the session's cluster."""

    def __init__(self, folder: Path, world: TinyWorld, *, dashboard: str) -> None:
        self._dashboard = dashboard
        self._file = folder / "config.yaml"
        example = yaml.safe_load((ROOT / "examples" / "serve_config.yaml").read_text())
        self._config: dict[str, Any] = example
        app = self._config["applications"][0]
        app["name"] = "deploy"
        app["route_prefix"] = "/deploy"
        app["args"] |= {
            "model": str(world.model),
            "adapter": str(world.adapter("alpha")),
            "num_cpus": 0.5,
            "max_rank": 8,
            "compile": False,
            "torch_threads": 1,
            "poll_s": 1.0,
        }

    def __call__(self, *, replicas: int, **args: Any) -> subprocess.CompletedProcess[str]:
        app = self._config["applications"][0]
        app["args"] |= args
        app["deployments"][0]["num_replicas"] = replicas
        self._file.write_text(yaml.safe_dump(self._config))
        return subprocess.run(
            [SERVE, "deploy", str(self._file), "-a", self._dashboard],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def deploy(cluster: Cluster, world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Deploy:
    return Deploy(tmp_path_factory.mktemp("deploy"), world, dashboard=cluster.dashboard)


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, world: TinyWorld, deploy: Deploy) -> Iterator[Fleet]:
    done = deploy(replicas=1)
    assert done.returncode == 0, done
    fleet = Fleet(url=f"http://127.0.0.1:{cluster.port}/deploy", app="deploy", world=world)
    with fleet.client:
        yield fleet
    serve.delete("deploy")


def test_serve_deploy_brings_up_a_fleet_on_the_declared_adapter(fleet: Fleet) -> None:
    view = fleet.settle(replicas=1)
    assert {r.revision for r in view.replicas} == {fleet.world.revision("alpha")}


def test_a_late_joiner_serves_what_the_fleet_holds_and_nobody_restarts(
    fleet: Fleet, deploy: Deploy
) -> None:
    before = {r.id for r in fleet.settle(replicas=1).replicas}
    held = fleet.roll("gamma")
    deploy(replicas=2)
    view = fleet.settle(replicas=2)
    assert {r.revision for r in view.replicas} == {held}
    assert before < {r.id for r in view.replicas}
