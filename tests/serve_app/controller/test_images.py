"""Accepted adapters are kept by digest, and packed once for each layout."""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from hotswap_lib import (
    BASE,
    Adapter,
    AdapterRefused,
    HotswapError,
    Layout,
    RankOverEnvelope,
    load_adapter,
)
from serve_app.controller.images import AdapterStore, ImageShelf
from serve_app.wire.errors import RevisionLost
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.fakes import CountingPut


def alpha(world: TinyWorld, **config: Any) -> Adapter:
    adapter = load_adapter(world.adapter("alpha"))
    return Adapter(name="alpha", config={**adapter.config, **config}, tensors=adapter.tensors)


@pytest.fixture(params=["path", "file", "memory"])
def state_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "path": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://images/{uuid.uuid4().hex}",
    }[request.param]


def test_a_kept_adapter_comes_back_as_the_same_revision(world: TinyWorld, state_uri: str) -> None:
    for name in ("alpha", "beta", "gamma"):
        adapter = load_adapter(world.adapter(name))
        AdapterStore(state_uri).keep(adapter)
        again = AdapterStore(state_uri).load(adapter.revision)
        assert again.revision == adapter.revision
        assert all(torch.equal(again.tensors[k], v) for k, v in adapter.tensors.items())


def test_an_adapter_in_memory_is_kept_like_one_on_disk(world: TinyWorld, tmp_path: Path) -> None:
    on_disk = load_adapter(world.adapter("beta"))
    patterns = {"rank_pattern": {}, "target_modules": {"q_proj", "v_proj"}}
    adapter = Adapter(name="m", config={**on_disk.config, **patterns}, tensors=on_disk.tensors)
    store = AdapterStore(str(tmp_path))
    store.keep(adapter)
    assert store.load(adapter.revision).revision == adapter.revision


def test_keeping_the_same_bytes_again_writes_nothing(world: TinyWorld, tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path))
    store.keep(alpha(world))
    [weights] = tmp_path.rglob("*.safetensors")
    before = weights.stat().st_mtime_ns
    store.keep(alpha(world))
    assert weights.stat().st_mtime_ns == before


def test_the_kept_copy_outlives_the_source(world: TinyWorld, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(world.adapter("alpha"), source)
    adapter = load_adapter(source)
    AdapterStore(str(tmp_path)).keep(adapter)
    shutil.rmtree(source)
    assert AdapterStore(str(tmp_path)).load(adapter.revision).revision == adapter.revision


def test_one_content_under_two_names_is_kept_once_and_loads_under_either(
    world: TinyWorld, tmp_path: Path
) -> None:
    one, two = alpha(world), load_adapter(world.adapter("alpha"), name="other")
    store = AdapterStore(str(tmp_path))
    store.keep(one)
    store.keep(two)
    assert len(list((tmp_path / "adapters").iterdir())) == 1
    assert store.load(one.revision).revision == one.revision
    assert store.load(two.revision).revision == two.revision


def test_a_copy_that_was_tampered_with_is_not_taken_for_the_revision(
    world: TinyWorld, tmp_path: Path
) -> None:
    store = AdapterStore(str(tmp_path))
    store.keep(alpha(world))
    [weights] = tmp_path.rglob("*.safetensors")
    shutil.copy(world.adapter("beta") / "adapter_model.safetensors", weights)
    with pytest.raises(RevisionLost, match="is no longer the content that was stored at"):
        store.load(alpha(world).revision)


def test_a_copy_that_is_gone_is_said_to_be_lost(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(HotswapError):
        AdapterStore(str(tmp_path)).load(alpha(world).revision)


def test_what_is_dropped_is_gone_and_the_rest_stays(world: TinyWorld, state_uri: str) -> None:
    store = AdapterStore(state_uri)
    first, second, third = (load_adapter(world.adapter(n)) for n in ("alpha", "beta", "gamma"))
    for adapter in (first, second, third):
        store.keep(adapter)
    gone = {first.revision.digest, second.revision.digest, "never there"}
    store.drop(gone, unless=lambda: {second.revision.digest})
    with pytest.raises(HotswapError):
        store.load(first.revision)
    for adapter in (second, third):
        assert store.load(adapter.revision).revision == adapter.revision
    store.keep(first)
    assert store.load(first.revision).revision == first.revision


def test_an_adapter_that_is_wanted_again_while_it_is_dropped_is_kept_whole(
    world: TinyWorld, tmp_path: Path
) -> None:
    adapter = load_adapter(world.adapter("alpha"))
    store = AdapterStore(str(tmp_path))
    store.keep(adapter)

    def wanted_again() -> tuple[str, ...]:
        keeping.start()
        return ()

    keeping = threading.Thread(target=store.keep, args=(adapter,))
    store.drop({adapter.revision.digest}, unless=wanted_again)
    keeping.join()
    assert store.load(adapter.revision).revision == adapter.revision


def test_an_accepted_adapter_is_packed_once_and_shared_by_reference(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        put = CountingPut()
        shelf = ImageShelf(AdapterStore(str(tmp_path)), put=put)
        shelf.add_layout(layout)
        revision = await shelf.accept(alpha(world))
        refs = await asyncio.gather(*(shelf.get(revision, layout.fingerprint) for _ in range(5)))
        assert len({id(ref) for ref in refs}) == 1
        assert [image.revision for image in put.images] == [revision]
        put.images[0].check()

    asyncio.run(story())


def test_many_who_ask_at_once_for_a_kept_revision_wait_for_one_packing(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        AdapterStore(str(tmp_path)).keep(alpha(world))
        put = CountingPut()
        shelf = ImageShelf(AdapterStore(str(tmp_path)), put=put)
        shelf.add_layout(layout)
        asked = [shelf.get(alpha(world).revision, layout.fingerprint) for _ in range(5)]
        await asyncio.gather(*asked)
        assert len(put.images) == 1

    asyncio.run(story())


def test_the_base_model_needs_no_kept_copy(layout: Layout, tmp_path: Path) -> None:
    async def story() -> None:
        put = CountingPut()
        shelf = ImageShelf(AdapterStore(str(tmp_path)), put=put)
        shelf.add_layout(layout)
        await shelf.get(BASE, layout.fingerprint)
        assert put.images[0].revision == BASE
        assert not any(block.any() for block in put.images[0].blocks)

    asyncio.run(story())


def test_an_adapter_that_does_not_fit_is_refused_and_not_kept(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        put = CountingPut()
        shelf = ImageShelf(AdapterStore(str(tmp_path)), put=put)
        shelf.add_layout(layout)
        big = alpha(world, r=64)
        with pytest.raises(AdapterRefused) as refused:
            await shelf.accept(big)
        assert isinstance(refused.value, RankOverEnvelope) or refused.value.adapter == "alpha"
        assert (put.images, list(tmp_path.iterdir())) == ([], [])

    asyncio.run(story())


def test_a_packing_that_failed_is_tried_again_when_asked_again(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        shelf = ImageShelf(AdapterStore(str(tmp_path)), put=CountingPut())
        shelf.add_layout(layout)
        revision = alpha(world).revision
        with pytest.raises(HotswapError):
            await shelf.get(revision, layout.fingerprint)
        AdapterStore(str(tmp_path)).keep(alpha(world))
        assert (await shelf.get(revision, layout.fingerprint)) is not None

    asyncio.run(story())


def test_one_who_stops_waiting_does_not_stop_the_packing_for_the_others(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        AdapterStore(str(tmp_path)).keep(alpha(world))
        shelf = ImageShelf(AdapterStore(str(tmp_path)), put=CountingPut())
        shelf.add_layout(layout)
        revision = alpha(world).revision
        one = asyncio.create_task(shelf.get(revision, layout.fingerprint))
        two = asyncio.create_task(shelf.get(revision, layout.fingerprint))
        await asyncio.sleep(0)
        one.cancel()
        assert (await two) is not None

    asyncio.run(story())


def test_what_is_not_needed_leaves_the_shelf_and_can_be_packed_again(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        put = CountingPut()
        shelf = ImageShelf(AdapterStore(str(tmp_path)), put=put)
        shelf.add_layout(layout)
        revision = await shelf.accept(alpha(world))
        shelf.keep_only(set())
        await shelf.get(revision, layout.fingerprint)
        assert [image.digest for image in put.images] == [put.images[0].digest] * 2

    asyncio.run(story())
