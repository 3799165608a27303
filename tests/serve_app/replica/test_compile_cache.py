"""Compiled code, shared between replicas that have no disk in common."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hotswap_lib import Slot
from serve_app.replica.compile_cache import CompileCache, open_compile_cache
from serve_app.settings import Settings
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.conftest import new_slot

# a replica's start as far as compiling goes, in a process and on a disk of its own
REPLICA = """
import asyncio, json, sys
from serve_app.engine.causal import CausalEngine
from serve_app.replica.compile_cache import open_compile_cache
from serve_app.replica.loading import load
from serve_app.settings import Settings

settings = Settings(model=sys.argv[1], max_rank=8, lanes=1, compile_cache_uri=sys.argv[2])
loaded = load(settings)
cache = open_compile_cache(loaded.slot, settings)
engine = CausalEngine(loaded.slot, settings, eos_token_ids=[259])
engine.start()
asyncio.run(engine.warm_up())
cache.publish()
from torch._dynamo.utils import counters
engine.stop()
print(json.dumps({"state": cache.state, **counters["inductor"]}))
"""


@pytest.fixture
def slot(world: TinyWorld) -> Slot:
    return new_slot(world)


BEFORE = "the-folder-from-before"


@pytest.fixture(autouse=True)
def own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSWAP_CACHE", str(tmp_path / "disk"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / BEFORE))


def settings(world: TinyWorld, uri: str | None, **more: Any) -> Settings:
    return Settings(model=str(world.model), compile_cache_uri=uri, **more)


@pytest.mark.slow
@pytest.mark.timeout(600)  # two processes, one of which compiles
def test_the_second_replica_compiles_nothing_though_it_shares_no_disk(
    world: TinyWorld, tmp_path: Path
) -> None:
    def start(disk: str) -> dict[str, Any]:
        model = shutil.copytree(world.model, tmp_path / disk / "model")  # each node has its own
        done = subprocess.run(
            [sys.executable, "-c", REPLICA, str(model), f"file://{tmp_path}/shared"],
            env=os.environ | {"HOTSWAP_CACHE": str(tmp_path / disk)},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    first, second = start("disk1"), start("disk2")
    assert (first["state"], second["state"]) == ("miss", "hit")
    assert first["fxgraph_cache_miss"] > 0
    assert second.get("fxgraph_cache_miss", 0) == 0
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"]


def test_without_a_uri_nothing_is_touched(slot: Slot, world: TinyWorld, tmp_path: Path) -> None:
    assert open_compile_cache(slot, settings(world, None)) == CompileCache("off")
    assert open_compile_cache(slot, settings(world, "x", compile=False)) == CompileCache("off")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / BEFORE)


def test_a_folder_that_inductor_could_not_work_in_is_not_used(
    slot: Slot, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTSWAP_CACHE", str(tmp_path / "a disk"))
    assert open_compile_cache(slot, settings(world, str(tmp_path / "shared"))).state == "off"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / BEFORE)


def test_what_is_shared_is_the_whole_folder_and_nothing_of_this_node(
    slot: Slot, world: TinyWorld, tmp_path: Path
) -> None:
    wanted = settings(world, str(tmp_path / "shared"))
    first = open_compile_cache(slot, wanted)
    assert first.folder is not None
    (first.folder / "ab").mkdir()
    (first.folder / "ab" / "kernel.so").write_bytes(b"code")
    (first.folder / "ab" / "kernel.lock").touch()
    first.publish()
    os.environ["HOTSWAP_CACHE"] = str(tmp_path / "other-disk")
    second = open_compile_cache(slot, wanted)
    assert second.state == "hit"
    assert second.folder is not None
    assert (second.folder / "ab" / "kernel.so").read_bytes() == b"code"
    assert not (second.folder / "ab" / "kernel.lock").exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(second.folder)


@pytest.mark.parametrize("damage", [b"", b"no archive at all"])
def test_a_damaged_archive_is_a_miss_and_is_replaced(
    slot: Slot, world: TinyWorld, tmp_path: Path, damage: bytes
) -> None:
    wanted = settings(world, str(tmp_path / "shared"))
    cache = open_compile_cache(slot, wanted)
    assert cache.uri is not None
    Path(cache.uri).parent.mkdir()
    Path(cache.uri).write_bytes(damage)
    again = open_compile_cache(slot, wanted)
    assert again.state == "miss"
    again.publish()
    assert open_compile_cache(slot, wanted).state == "hit"


def test_a_store_out_of_reach_costs_a_warning_and_no_more(
    slot: Slot, world: TinyWorld, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = open_compile_cache(slot, settings(world, str(tmp_path / "file")))
    assert cache.state == "miss"
    cache.publish()


def test_the_same_model_in_another_folder_has_the_same_archive(
    world: TinyWorld, tmp_path: Path
) -> None:
    copied = TinyWorld(tmp_path / "elsewhere")
    shutil.copytree(world.model, copied.model)
    wanted = settings(world, str(tmp_path / "shared"))
    uris = {open_compile_cache(new_slot(one), wanted).uri for one in (world, copied)}
    assert len(uris) == 1


def test_another_envelope_has_another_archive(world: TinyWorld, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from hotswap_lib import Envelope, prepare

    wanted = settings(world, str(tmp_path / "shared"))
    model = LlamaForCausalLM.from_pretrained(world.model)
    other = prepare(model, envelope=Envelope(max_rank=4))
    uris = {
        open_compile_cache(one, wanted).uri for one in (new_slot(world), new_slot(world), other)
    }
    assert len(uris) == 2
