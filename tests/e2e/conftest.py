"""One Ray cluster for the whole session, one application for each module that asks for it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from transformers import LlamaForCausalLM

from serve_app.app import build

from .fleet import Fleet
from .tiny_world import TinyWorld, make_world

REPLICAS = 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`port`: Serve's HTTP port. `dashboard`: where `serve deploy` sends its config."""

    port: int
    dashboard: str


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tireless(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """The same with a model that never ends an answer by itself."""
    copied = TinyWorld(tmp_path_factory.mktemp("tireless") / "world")
    shutil.copytree(world.folder, copied.folder)
    model = LlamaForCausalLM.from_pretrained(copied.model)
    # a logit of 0, where the likeliest of 260 tokens has far more
    model.lm_head.weight.data[model.config.eos_token_id] = 0
    model.save_pretrained(copied.model)
    return copied


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Ray cluster with Serve, on free ports."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    os.environ["PYTHONWARNINGS"] = "default"  # warnings are errors here, not in ray's own workers
    os.environ["HF_HUB_OFFLINE"] = "1"  # an adapter that is not there is not looked for elsewhere
    context = ray.init(
        num_cpus=16,
        include_dashboard=True,  # `serve deploy` talks to it
        dashboard_port=free_port(),
        log_to_driver=False,
        logging_level="ERROR",
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield Cluster(port=port, dashboard=f"http://{context.dashboard_url}")
    serve.shutdown()
    ray.shutdown()


@contextmanager
def deployed(cluster: Cluster, world: TinyWorld, *, app: str, **settings: Any) -> Iterator[Fleet]:
    """The application with these settings, gone afterwards."""
    given: dict[str, Any] = {
        "model": str(world.model),
        "served_model_name": "tiny",
        "replicas": REPLICAS,
        "num_cpus": 0.5,
        "max_rank": 8,
        "compile": False,
        "torch_threads": 1,
        "poll_s": 1.0,
        "max_model_len": 4096,
    } | settings
    serve.run(build(given), name=app, route_prefix=f"/{app}")
    try:
        url, token = f"http://127.0.0.1:{cluster.port}/{app}", given.get("admin_token")
        fleet = Fleet(url=url, app=app, world=world, token=token)
        fleet.settle(replicas=given["replicas"])
        with fleet.client:
            yield fleet
    finally:
        serve.delete(app)


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, world: TinyWorld, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Two replicas on `alpha`."""
    app = request.module.__name__.rsplit("_", 1)[-1]
    with deployed(cluster, world, app=app, adapter=str(world.adapter("alpha"))) as running:
        yield running
