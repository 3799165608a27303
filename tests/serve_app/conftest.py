"""The tiny chat model and its adapters, made once for all tests of the application."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from hotswap_lib import AdapterImage, Envelope, Layout, Slot, pack, prepare
from tests.e2e.tiny_world import TinyWorld, make_world

MAX_RANK = 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # torch 2.13 itself, the first time that something is compiled
    known = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
    for item in items:
        if "serve_app" in item.path.parts:
            item.add_marker(known)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_tiny_models() -> None:
    """Several threads only wait for each other in products this small, most on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """Stopping an engine collects garbage, which takes a second while it looks at all modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def new_slot(world: TinyWorld) -> Slot:
    """A slot of its own over the tiny model, with nothing in it."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(world.model, attn_implementation="sdpa")
    return prepare(model.eval(), envelope=Envelope(max_rank=MAX_RANK))


@pytest.fixture(scope="session")
def layout(world: TinyWorld) -> Layout:
    return new_slot(world).layout


@pytest.fixture(scope="session")
def images(world: TinyWorld, layout: Layout) -> dict[str, AdapterImage]:
    """Adapter name → its image for every slot of `new_slot`."""
    return {name: pack(world.adapter(name), layout) for name in world.revisions.values()}
