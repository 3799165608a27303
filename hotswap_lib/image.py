"""Images: an adapter packed for a layout. The second stage: source → pack → stage → commit.

`pack` runs on the host alone and asks every question about the adapter, so whatever is wrong with
one is said before any live memory is touched. The image's bytes are the slot's bytes: committing
it is a copy and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import ImageCorrupted, NonFinite
from .fit import Fit, fit
from .layout import Entry, Layout
from .revision import BASE, Revision
from .source import Adapter, load_adapter

# What peft_config has to say about the live adapter so that PEFT finds the same layers again.
CONFIG_FIELDS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterImage:
    """One adapter, ready to copy into any slot of one layout.

    Attributes:
        revision: which adapter this is.
        layout_fingerprint: of the layout that it was packed for.
        blocks: one uint8 array per block of the layout, read-only. Ray's object store and any
            other pickle protocol 5 transport carry them out of band, without a copy.
        config: the fields of the adapter's configuration that `CONFIG_FIELDS` names.
        ranks: module → unpadded rank, for the modules that the adapter changes.
        digest: SHA-256 of everything above; a slot checks it before it takes the image.
    """

    revision: Revision
    layout_fingerprint: str
    blocks: tuple[Bytes, ...]
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    digest: str

    def __post_init__(self) -> None:
        for block in self.blocks:  # a slot on the CPU may read them where they are
            block.setflags(write=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self.blocks)

    def check(self) -> None:
        """Compare the bytes with the digest.

        Raises:
            ImageCorrupted: they differ.
        """
        digest = _digest(
            self.revision, self.layout_fingerprint, self.blocks, [self.config, self.ranks]
        )
        if digest != self.digest:
            rule = f"its bytes have digest {digest[:8]} and were packed with {self.digest[:8]}"
            raise ImageCorrupted(str(self.revision), rule)

    def __reduce__(self) -> tuple[Callable[..., AdapterImage], tuple[Any, ...]]:
        # through the constructor, so that a copy's blocks are read-only too
        parts = (self.revision, self.layout_fingerprint, self.blocks, self.config, self.ranks)
        return _rebuild, (*parts, self.digest)


def pack(
    source: str | Path | Adapter,
    layout: Layout,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
) -> AdapterImage:
    """Load an adapter, check it against a layout, and write its image. Host only.

    Ranks are padded with zeros, weights are cast into the slot's dtype, and modules that the
    adapter leaves alone are zero. The keyword arguments are those of
    `hotswap_lib.source.load_adapter`.

    Raises:
        AdapterRefused: the subclass for the rule that the adapter breaks.
    """
    adapter = load_adapter(
        source,
        name=name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        subfolder=subfolder,
    )
    fitted = fit(adapter, layout)
    blocks = _write(fitted, layout)
    _check_finite(adapter, fitted, layout, blocks)
    config = {field: adapter.config.get(field) for field in CONFIG_FIELDS}
    return _image(adapter.revision, layout, blocks, config, fitted.ranks)


def null_image(layout: Layout) -> AdapterImage:
    """All zeros: the base model as it is, under revision `BASE`.

    Its configuration describes the slot itself: every target at the envelope's rank.
    """
    envelope = layout.envelope
    targets = envelope.target_modules
    config = {
        **dict.fromkeys(CONFIG_FIELDS),
        "r": envelope.max_rank,
        "lora_alpha": envelope.max_rank,
        "use_rslora": False,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    blocks = _empty_blocks(layout)
    ranks = {e.module: e.shape[e.rank_dim] for e in layout.entries if e.rank_dim is not None}
    return _image(BASE, layout, blocks, config, ranks)


def as_tensor(block: Bytes) -> torch.Tensor:
    """The block as a uint8 tensor over the same memory; nobody may write to it.

    Torch warns about read-only arrays and has no read-only tensors. The array is therefore shown
    to it through an interface that claims to be writable, and that keeps the block alive.
    """
    return torch.from_numpy(np.asarray(_Writable(block)))


class _Writable:
    def __init__(self, block: Bytes) -> None:
        self.block = block
        pointer, _ = block.__array_interface__["data"]
        self.__array_interface__ = {**block.__array_interface__, "data": (pointer, False)}


def _empty_blocks(layout: Layout) -> list[Bytes]:
    # torch's allocator, because numpy's aligns to 16 bytes only, and misaligned copies are slower
    return [torch.zeros(block.nbytes, dtype=torch.uint8).numpy() for block in layout.blocks]


def _write(fitted: Fit, layout: Layout) -> list[Bytes]:
    blocks = _empty_blocks(layout)
    views = [torch.from_numpy(block) for block in blocks]
    for entry, tensor in fitted.writes:
        target = entry.view(views[entry.block])
        if entry.rank_dim is not None:
            target = target.narrow(entry.rank_dim, 0, tensor.shape[entry.rank_dim])
        target.copy_(tensor)
    for entry in layout.entries:
        if entry.is_scaling and entry.module in fitted.scalings:
            entry.view(views[entry.block]).fill_(fitted.scalings[entry.module])
    return blocks


def _check_finite(adapter: Adapter, fitted: Fit, layout: Layout, blocks: Sequence[Bytes]) -> None:
    # one pass per dtype over the packed bytes, and a look at single tensors only if it fails
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in layout.entries:
        groups.setdefault((entry.block, entry.dtype), []).append(entry)
    for (block, dtype), entries in groups.items():
        raw = torch.from_numpy(blocks[block])
        span = raw[entries[0].offset : entries[-1].offset + entries[-1].nbytes]
        if bool(torch.isfinite(torch.stack(torch.aminmax(span.view(getattr(torch, dtype))))).all()):
            continue
        for entry, tensor in fitted.writes:
            stored = tensor.isfinite().all()
            if not stored or not entry.view(torch.from_numpy(blocks[entry.block])).isfinite().all():
                cast = f" once it is cast to {entry.dtype}" if stored else ""
                raise NonFinite(adapter.name, entry.key, f"it holds NaN or infinity{cast}")
        raise AssertionError("fit lets no scaling through that float32 cannot hold")


def _image(
    revision: Revision,
    layout: Layout,
    blocks: Sequence[Bytes],
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
) -> AdapterImage:
    digest = _digest(revision, layout.fingerprint, blocks, [config, ranks])
    return _rebuild(revision, layout.fingerprint, tuple(blocks), config, ranks, digest)


def _rebuild(
    revision: Revision,
    layout_fingerprint: str,
    blocks: tuple[Bytes, ...],
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    digest: str,
) -> AdapterImage:
    return AdapterImage(
        revision=revision,
        layout_fingerprint=layout_fingerprint,
        blocks=blocks,
        config=config,
        ranks=ranks,
        digest=digest,
    )


def _digest(
    revision: Revision, fingerprint: str, blocks: Sequence[Bytes], notes: Sequence[Any]
) -> str:
    head = [revision.name, revision.digest, fingerprint, *notes]
    sha = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for block in blocks:
        sha.update(block.data)
    return sha.hexdigest()
