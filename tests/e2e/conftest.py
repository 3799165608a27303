"""One Ray cluster for the whole session, one application for each module that asks for it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cluster_utils, serve
from transformers import LlamaForCausalLM

from serve_app.app import build

from .fleet import Fleet
from .tiny_world import TinyWorld, make_world

REPLICAS = 2
CPUS = 16  # of each node, as far as Ray is told


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
    nodes: cluster_utils.Cluster

    def kill(self, node: Any) -> None:
        """Everything on it dies at once."""
        self.nodes.remove_node(node, allow_graceful=False)


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
    dashboard = free_port()
    nodes = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": CPUS,
            "include_dashboard": True,  # `serve deploy` talks to it
            "dashboard_port": dashboard,
        },
    )
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    port = free_port()
    # one proxy: the nodes are one machine, and it has one such port
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    yield Cluster(port=port, dashboard=f"http://127.0.0.1:{dashboard}", nodes=nodes)
    serve.shutdown()
    ray.shutdown()
    nodes.shutdown()


@contextmanager
def deployed(
    cluster: Cluster,
    world: TinyWorld,
    *,
    app: str,
    meanwhile: Callable[[], None] = lambda: None,
    **settings: Any,
) -> Iterator[Fleet]:
    """The application with these settings, gone afterwards. `meanwhile`: while it starts."""
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
    try:
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(serve.run, build(given), name=app, route_prefix=f"/{app}")
            meanwhile()
            starting.result()
        url, token = f"http://127.0.0.1:{cluster.port}/{app}", given.get("admin_token")
        fleet = Fleet(url=url, app=app, world=world, token=token)
        fleet.settle(replicas=given["replicas"])
        with fleet.client:
            yield fleet
    finally:
        serve.delete(app)


@pytest.fixture(scope="session")
def shared_fleet(cluster: Cluster, world: TinyWorld) -> Iterator[Fleet]:
    """Two replicas, deployed once: starting them takes longer than most tests."""
    with deployed(cluster, world, app="shared", adapter=str(world.adapter("alpha"))) as running:
        yield running


@pytest.fixture(scope="module")
def fleet(shared_fleet: Fleet) -> Fleet:
    """Two replicas on `alpha` and nothing else, whatever the module before left there."""
    for adapter in shared_fleet.client.adapters().data:
        shared_fleet.client.unload_adapter(adapter.lora_name)
    if shared_fleet.settle(replicas=REPLICAS).stable != shared_fleet.world.revision("alpha"):
        shared_fleet.roll("alpha")
    return shared_fleet
