"""Images: adapters packed for a layout. The second stage: source → pack → stage → commit.

`pack` runs on the host and checks everything about the adapter, so a bad one is rejected before
live memory is touched. The image's bytes are the slot's bytes: a commit only copies them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from .errors import ImageCorrupted, NonFinite
from .fit import Fit, fit
from .layout import SCALING, Entry, Layout
from .memory import Bytes, allocate, row_major
from .revision import BASE, Revision
from .source import Adapter, load_adapter

# The fields of peft_config that PEFT needs to rebuild the live adapter's layers.
CONFIG_FIELDS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterImage:
    """One adapter, ready to copy into any slot of one layout.

    Attributes:
        revision: the adapter's revision.
        layout_fingerprint: of the layout that it was packed for.
        blocks: one uint8 array per block of the layout, read-only. Ray's object store, like any
            transport with pickle protocol 5, carries them out of band, without a copy.
        config: the fields of the adapter's configuration that `CONFIG_FIELDS` names.
        ranks: module → unpadded rank, for the LoRA layers that the adapter changes.
        written: the indices of the layout's entries that the adapter has values for, ascending. A
            slot fills the others with their defaults.
        arrived_as: its digest when it left another process or was saved; None for an image that
            was packed here. A slot compares the bytes with it before it stages them.
    """

    revision: Revision
    layout_fingerprint: str
    blocks: tuple[Bytes, ...]
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    written: tuple[int, ...]
    arrived_as: str | None = None
    _known: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for block in self.blocks:  # a slot on the CPU may read them where they are
            block.setflags(write=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def digest(self) -> str:
        """64 hex characters over all fields but ``arrived_as``.

        Computed on first use: an image that never leaves its process does not need it.
        """
        if not self._known:
            self._known.append(self._compute_digest())
        return self._known[0]

    def check(self) -> None:
        """Compare the bytes with the digest that they arrived with.

        The digest is computed once, since the bytes are read-only.

        Raises:
            ImageCorrupted: they differ.
        """
        if self.arrived_as is not None and self.digest != self.arrived_as:
            rule = f"its bytes have digest {self.digest[:8]} and left with {self.arrived_as[:8]}"
            raise ImageCorrupted(str(self.revision), rule)

    def is_like(self, other: AdapterImage) -> bool:
        """True if both images have the same bytes: packing is deterministic."""
        return self._identity() == other._identity()

    def _identity(self) -> tuple[Revision, str]:
        return self.revision, self.layout_fingerprint

    def _compute_digest(self) -> str:
        head = [self.revision.name, self.revision.digest, self.layout_fingerprint]
        notes = [dict(self.config), dict(self.ranks), list(self.written)]
        # not sorted: PEFT takes the first pattern that matches, so their order is content
        digest = blake3(json.dumps([head, notes]).encode())
        for block in self.blocks:
            digest.update(block.data)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Callable[..., AdapterImage], tuple[Any, ...]]:
        # through the constructor, so that a copy's blocks are read-only too, and with the digest
        parts = (self.revision, self.layout_fingerprint, self.blocks, self.config, self.ranks)
        return _rebuild, (*parts, self.written, self.digest)


def _rebuild(
    revision: Revision,
    layout_fingerprint: str,
    blocks: tuple[Bytes, ...],
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    written: tuple[int, ...],
    arrived_as: str,
) -> AdapterImage:
    return AdapterImage(
        revision=revision,
        layout_fingerprint=layout_fingerprint,
        blocks=blocks,
        config=config,
        ranks=ranks,
        written=written,
        arrived_as=arrived_as,
    )


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

    Ranks are padded with zeros and weights are cast into the slot's dtype. Tensors that the adapter
    does not have stay zero; where zero would be wrong (saved modules, biases, DoRA magnitudes) the
    slot fills in the base model's values. The keyword arguments are those of
    `hotswap_lib.load_adapter`.

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
    return AdapterImage(
        revision=adapter.revision,
        layout_fingerprint=layout.fingerprint,
        blocks=tuple(blocks),
        config={field: adapter.config.get(field) for field in CONFIG_FIELDS},
        ranks=fitted.ranks,
        written=tuple(write.index for write in fitted.writes),
    )


def null_image(layout: Layout) -> AdapterImage:
    """An image of zeros, with which the model computes what the base model computes.

    Its revision is `BASE`. Its configuration describes the slot itself: every target at the
    envelope's rank.
    """
    envelope = layout.envelope
    targets = envelope.target_modules
    config = {
        **dict.fromkeys(CONFIG_FIELDS),
        "r": envelope.max_rank,
        "lora_alpha": 0,  # as the scalings, which are zero
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    padded = {i: entry for i, entry in enumerate(layout.entries) if entry.padding is not None}
    return AdapterImage(
        revision=BASE,
        layout_fingerprint=layout.fingerprint,
        blocks=tuple(allocate(block.nbytes) for block in layout.blocks),
        config=config,
        ranks={entry.module: envelope.max_rank for entry in padded.values()},
        written=tuple(padded),
    )


def as_tensor(block: Bytes) -> torch.Tensor:
    """The block as a uint8 tensor over the same memory; never write to it.

    Torch has no read-only tensors and warns about read-only arrays. `_Writable` presents the array
    as writable, and keeps the block alive.
    """
    return torch.from_numpy(np.asarray(_Writable(block)))


class _Writable:
    def __init__(self, block: Bytes) -> None:
        self.block = block
        pointer, _ = block.__array_interface__["data"]
        self.__array_interface__ = {**block.__array_interface__, "data": (pointer, False)}


def _write(fitted: Fit, layout: Layout) -> list[Bytes]:
    blocks = [allocate(block.nbytes) for block in layout.blocks]
    kinds = {(entry.block, entry.dtype) for entry in layout.entries}
    flat = {
        (block, dtype): torch.from_numpy(blocks[block]).view(getattr(torch, dtype))
        for block, dtype in kinds
    }
    for write in fitted.writes:
        entry, shape = write.entry, list(write.entry.shape)
        if entry.padding is not None and entry.padding.groups > 1:
            entry.padding.write(_at(flat, entry, shape), write.tensor, write.rank)
            continue
        if entry.padding is not None:
            shape[entry.padding.dim] = entry.padding.size(write.rank)
        _at(flat, entry, shape).copy_(write.tensor)
    scalings: dict[tuple[int, str], list[Entry]] = {}
    for entry in layout.entries:
        if entry.role == SCALING and entry.module in fitted.scalings:
            scalings.setdefault((entry.block, entry.dtype), []).append(entry)
    for place, entries in scalings.items():
        typed = flat[place]
        where = torch.tensor([entry.offset // typed.itemsize for entry in entries])
        values = [fitted.scalings[entry.module] for entry in entries]
        typed[where] = torch.tensor(values, dtype=typed.dtype)
    return blocks


def _at(
    flat: Mapping[tuple[int, str], torch.Tensor], entry: Entry, shape: Sequence[int]
) -> torch.Tensor:
    # one call into torch for each of hundreds of tensors, where slicing would take four
    typed = flat[entry.block, entry.dtype]
    return typed.as_strided(shape, row_major(entry.shape), entry.offset // typed.itemsize)


def _check_finite(adapter: Adapter, fitted: Fit, layout: Layout, blocks: Sequence[Bytes]) -> None:
    # one pass per dtype over the packed bytes, and a look at single tensors only if it fails
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in layout.entries:
        groups.setdefault((entry.block, entry.dtype), []).append(entry)
    for (block, dtype), entries in groups.items():
        if not getattr(torch, dtype).is_floating_point:
            continue
        raw = torch.from_numpy(blocks[block])
        span = raw[entries[0].offset : entries[-1].offset + entries[-1].nbytes]
        if bool(torch.isfinite(torch.stack(torch.aminmax(span.view(getattr(torch, dtype))))).all()):
            continue
        for write in fitted.writes:
            entry, stored = write.entry, write.tensor.isfinite().all()
            if not stored or not entry.view(torch.from_numpy(blocks[entry.block])).isfinite().all():
                cast = f" once it is cast to {entry.dtype}" if stored else ""
                raise NonFinite(adapter.name, entry.key, f"it holds NaN or infinity{cast}")
        raise AssertionError("fit rejects every scaling that float32 cannot hold")
