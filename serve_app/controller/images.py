"""Adapter images: each one packed once, shared through Ray's object store.

An accepted adapter is copied to `<state_uri>/adapters/<digest>`,
because a path or a Hub branch may hold something else tomorrow, while a revision may not: an undo
or a late joiner packs from that copy, and its digest proves that it is the same adapter.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress

import fsspec
import ray
import safetensors.torch

from hotswap_lib import (
    BASE,
    Adapter,
    AdapterImage,
    Layout,
    Revision,
    load_adapter,
    null_image,
    pack,
)
from serve_app.wire.errors import RevisionLost

Put = Callable[[AdapterImage], ray.ObjectRef]


class AdapterStore:
    """Accepted adapters as ordinary PEFT checkpoints, by digest. Calls block on I/O."""

    def __init__(self, state_uri: str) -> None:
        self._root = f"{state_uri.rstrip('/')}/adapters"
        self._busy = threading.Lock()  # an adapter may be stored again while it is deleted

    def keep(self, adapter: Adapter) -> None:
        """Stores the adapter unless these bytes are stored already."""
        folder = f"{self._root}/{adapter.revision.digest}"
        # an instance of its own: a transaction belongs to the instance, and threads share those
        fs, folder = fsspec.url_to_fs(folder, skip_instance_cache=True)
        weights = f"{folder}/adapter_model.safetensors"
        with self._busy:
            if fs.exists(weights):
                return
            fs.makedirs(folder, exist_ok=True)
            # the weights last: if they exist, the copy is complete
            with fs.transaction:
                with fs.open(f"{folder}/adapter_config.json", "wb") as file:
                    file.write(json.dumps(dict(adapter.config), default=list).encode())
                with fs.open(weights, "wb") as file:
                    file.write(safetensors.torch.save(dict(adapter.tensors)))

    def drop(
        self, digests: Collection[str], *, unless: Callable[[], Collection[str]] = tuple
    ) -> None:
        """Deletes the adapters with these digests, except those that `unless()` names by then."""
        for digest in digests:
            fs, folder = fsspec.url_to_fs(f"{self._root}/{digest}", skip_instance_cache=True)
            with self._busy:
                if digest in unless():
                    continue
                with suppress(FileNotFoundError):
                    # the weights first: a partial copy must not look complete
                    fs.rm_file(f"{folder}/adapter_model.safetensors")
                    fs.rm(folder, recursive=True)

    def load(self, revision: Revision) -> Adapter:
        """Raises `RevisionLost` if the content has changed, `AdapterRefused` if it is gone."""
        where = f"{self._root}/{revision.digest}"
        adapter = load_adapter(where, name=revision.name)
        if adapter.revision != revision:
            raise RevisionLost(str(revision), where)
        return adapter


class ImageShelf:
    """Images by (revision, layout), each packed at most once. For one event loop."""

    def __init__(self, store: AdapterStore, *, put: Put = ray.put) -> None:
        self._store = store
        self._share = put
        self._layouts: dict[str, Layout] = {}
        self._shelf: dict[tuple[str, str], asyncio.Task[ray.ObjectRef]] = {}

    def add_layout(self, layout: Layout) -> None:
        self._layouts[layout.fingerprint] = layout

    def knows(self, fingerprint: str) -> bool:
        return fingerprint in self._layouts

    async def accept(self, adapter: Adapter) -> Revision:
        """Packs the adapter for every layout of the fleet, and stores it.

        Raises `AdapterRefused`, storing nothing, when one layout cannot hold it.
        """
        images = [await asyncio.to_thread(pack, adapter, one) for one in self._layouts.values()]
        await asyncio.to_thread(self._store.keep, adapter)
        for image in images:
            self._put(adapter.revision, image.layout_fingerprint, _done(image))
        return adapter.revision

    async def get(self, revision: Revision, fingerprint: str) -> ray.ObjectRef:
        """The image's reference; packed from the stored adapter if necessary."""
        task = self._shelf.get((revision.key, fingerprint))
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            layout = self._layouts[fingerprint]
            task = self._put(revision, fingerprint, asyncio.to_thread(self._pack, revision, layout))
        return await asyncio.shield(task)

    def keep_only(self, revisions: set[str]) -> None:
        """Drops the other images; Ray frees them once no replica maps them."""
        self._shelf = {k: task for k, task in self._shelf.items() if k[0] in revisions}

    def _pack(self, revision: Revision, layout: Layout) -> AdapterImage:
        if revision == BASE:
            return null_image(layout)
        return pack(self._store.load(revision), layout)

    def _put(
        self, revision: Revision, fingerprint: str, image: Awaitable[AdapterImage]
    ) -> asyncio.Task[ray.ObjectRef]:
        async def put() -> ray.ObjectRef:
            return self._share(await image)

        task = asyncio.create_task(put())
        self._shelf[revision.key, fingerprint] = task
        return task


async def _done(image: AdapterImage) -> AdapterImage:
    return image
