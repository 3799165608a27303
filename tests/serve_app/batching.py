"""Engines that batch, outside of Serve: a replica's context without a replica, and tiny models."""

from __future__ import annotations

import asyncio
import copy
import gc
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray.serve import context
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank

from hotswap_lib import AdapterImage, Envelope, Slot, Staged, pack, prepare
from serve_app.engine.batching import BatchEngine
from tests.hotswap_lib.families import randomize

T = TypeVar("T")
E = TypeVar("E", bound=BatchEngine[Any])


@contextmanager
def replica_context() -> Iterator[None]:
    """The context that `serve.batch` needs; Ray's own tests make it this way."""
    before = context._INTERNAL_REPLICA_CONTEXT
    context._set_internal_replica_context(
        replica_id=ReplicaID("test", DeploymentID("Model")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=1000),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )
    try:
        yield
    finally:
        context._INTERNAL_REPLICA_CONTEXT = before


class Models:
    """One base model and adapters for it, saved as a trainer would."""

    def __init__(self, base: Any, folder: Path, saved: tuple[str, ...] = (), **more: Any) -> None:
        self._base = base.eval()
        self._folder = folder
        self.envelope = Envelope(max_rank=8, modules_to_save=list(saved) or None)
        self.paths: dict[str, Path] = {}
        self._plain: dict[str, Any] = {}
        for seed, name in enumerate(("red", "blue")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig(
                    r=4 + 4 * seed,
                    target_modules="all-linear",
                    modules_to_save=list(saved) or None,
                    **more,
                )
                model = get_peft_model(copy.deepcopy(base), config)
            randomize(model, seed)
            self.paths[name] = folder / name
            model.save_pretrained(str(folder / name))

    def base(self) -> Any:
        return copy.deepcopy(self._base)

    def slot(self) -> Slot:
        return prepare(self.base(), envelope=self.envelope)

    def image(self, name: str, slot: Slot) -> AdapterImage:
        return pack(str(self.paths[name]), slot.layout)

    def plain(self, name: str) -> Any:
        """A plain PeftModel with the adapter, made once; of `base`: the base model."""
        if name == "base":
            return self.base()
        if name not in self._plain:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(self.base(), str(self.paths[name]))
            self._plain[name] = model.eval()
        return self._plain[name]


class Running(Generic[E]):
    """A started engine with an open gate, and its loop."""

    def __init__(self, engine: E, models: Models) -> None:
        self.engine = engine
        self.models = models
        self._runner = asyncio.Runner()
        engine.start()
        engine.admission.open()

    def __call__(self, story: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(story, 120))

    def close(self) -> None:
        self.engine.stop()
        self._runner.close()
        # serve.batch needs an event loop when it is collected, or makes one and never closes it
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        del self.engine._enter
        gc.collect()
        asyncio.set_event_loop(None)
        loop.close()

    def staged(self, name: str) -> Staged:
        return self.engine.slot.stage(self.models.image(name, self.engine.slot))

    async def swap(self, name: str) -> str:
        await self.engine.cut_over(self.staged(name), in_flight="overlap")
        return str(self.engine.default)


@contextmanager
def running(engine: E, models: Models) -> Iterator[Running[E]]:
    with replica_context():
        started = Running(engine, models)
        try:
            yield started
        finally:
            started.close()


def texts(vocabulary: int, *lengths: int) -> list[list[int]]:
    """Random token ids, always the same; none below 3, which are special here."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [
        torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]
