"""The layout: the position of every swappable tensor in a slot's memory.

`prepare` makes it, `pack` writes images for it, and `stage` compares its fingerprint. One block of
bytes per device holds all slot tensors on that device, scalings included. Within a block the
entries are grouped by dtype, so one dtype is one range, and each entry starts at a multiple of
`ALIGNMENT` bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from .envelope import Envelope
from .memory import ALIGNMENT

PREFIX = "base_model.model."
"""PEFT's prefix of the module names in a checkpoint's keys."""

SCALING = "scaling"
BIAS = "bias"
SAVED = "saved"
MAGNITUDE = "lora_magnitude_vector"

Default = Literal["zeros", "base", "norm"]
"""The value of a tensor that the live adapter does not have: zeros, the base model's own values,
or the weight norm with which a DoRA layer computes plain LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """The position of a tensor of lower rank inside one of the envelope's rank. Zeros fill it up.

    Attributes:
        dim: the dimension that is the rank.
        max_rank: the rank that fills it.
        groups: the dimension holds this many groups of ranks, each padded on its own: the groups
            of a convolution, in lora_A.
        per_index: ranks that share one index: the groups of a convolution, in lora_B.
    """

    dim: int
    max_rank: int
    groups: int = 1
    per_index: int = 1

    def size(self, rank: int) -> int:
        """The dimension's size for a rank that is divisible by groups."""
        return rank // self.per_index

    def window(self, padded: torch.Tensor, rank: int) -> torch.Tensor:
        """A view of the part that belongs to ``rank``; groups become a dimension of their own."""
        size = self.size(rank) // self.groups
        if self.groups > 1:
            padded = _split(padded, self.dim, self.groups)
        return padded.narrow(self.dim + (self.groups > 1), 0, size)

    def write(self, padded: torch.Tensor, own: torch.Tensor, rank: int) -> None:
        """Copy a tensor of its own rank into its part of the padded one."""
        if self.groups > 1:
            own = _split(own, self.dim, self.groups)
        self.window(padded, rank).copy_(own)

    def read(self, padded: torch.Tensor, rank: int) -> torch.Tensor:
        """The tensor of its own rank again: a view, or a copy where there are groups."""
        window = self.window(padded, rank)
        return window.flatten(self.dim, self.dim + 1) if self.groups > 1 else window


def _split(tensor: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    shape = tensor.shape
    return tensor.view(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A swappable tensor before its offset is known.

    Attributes:
        key: its key in a PEFT checkpoint; for a scaling, the module's key and ``.scaling``.
        module: the module's name as PEFT's rank and alpha patterns see it.
        role: ``lora_A.weight``, ..., `SCALING`, `BIAS`, `MAGNITUDE`, or `SAVED`.
        shape: padded shape; ``()`` for a scaling.
        padding: how ranks are padded; None where the shape does not depend on the rank.
        default: its value while the live adapter does not have it.
        dtype: ``"float32"`` and so on.
        device: its device in the model.
    """

    key: str
    module: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    padding: Padding | None = None
    default: Default = "zeros"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One swappable tensor: a `Place`, with its position.

    Attributes:
        block: index of its block.
        offset: bytes from the start of that block.
        nbytes: size, without the gap to the next entry.
    """

    key: str
    module: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    padding: Padding | None
    default: Default
    block: int
    offset: int
    nbytes: int

    @property
    def is_scaling(self) -> bool:
        """True for a layer's factor of B·A."""
        return self.role == SCALING

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """This entry's tensor inside its block (uint8, one dimension): a view, not a copy."""
        raw = block[self.offset : self.offset + self.nbytes]
        # .data: autograd and dynamo must not treat it as a view of the block
        return raw.view(getattr(torch, self.dtype)).view(self.shape).data


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One contiguous run of bytes on one device."""

    device: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The ordered table of every swappable tensor. Host only, frozen, picklable.

    Attributes:
        entries: all tensors in block order, scalings among them.
        blocks: one for each device.
        envelope: the bounds of the slot's adapters.
        base_model: the base model's name or path where it has one; for display.
        base_weights: checkpoint key → dtype and digest of a weight of the base model that PEFT
            adds to checkpoints with LoRA on embeddings. It has no entry: an adapter may contain it
            if it is equal to the base model's.
        fingerprint: 64 hex characters; layouts with the same fingerprint accept each other's
            images. It depends on how the entries are split into blocks. It does not depend on
            device names, so that one image serves replicas on cuda:0 and on cuda:1, nor on the
            base model's name, since the same model has other paths on other machines.
    """

    entries: tuple[Entry, ...]
    blocks: tuple[Block, ...]
    envelope: Envelope
    base_model: str | None = None
    base_weights: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", _fingerprint(self.entries, self.blocks))

    @property
    def nbytes(self) -> int:
        """Bytes of one image, over all blocks, alignment gaps included."""
        return sum(block.nbytes for block in self.blocks)


def _fingerprint(entries: Sequence[Entry], blocks: Sequence[Block]) -> str:
    table = [
        (
            *(e.key, e.module, e.role, e.shape, e.dtype, _as_list(e.padding), e.default),
            *(e.block, e.offset, e.nbytes),
        )
        for e in entries
    ]
    sizes = [block.nbytes for block in blocks]
    return hashlib.sha256(json.dumps(["hotswap-layout-2", sizes, table]).encode()).hexdigest()


def _as_list(padding: Padding | None) -> list[int] | None:
    if padding is None:
        return None
    return [padding.dim, padding.max_rank, padding.groups, padding.per_index]


def lay_out(
    places: Iterable[Place],
    envelope: Envelope,
    *,
    base_model: str | None,
    base_weights: Mapping[str, tuple[str, str]] | None = None,
) -> Layout:
    """Give each place its block and offset, in the order given, device by device."""
    places = list(places)
    devices = list(dict.fromkeys(place.device for place in places))
    entries: list[Entry] = []
    blocks: list[Block] = []
    for index, device in enumerate(devices):
        here = [place for place in places if place.device == device]
        offset = 0
        for dtype in sorted({place.dtype for place in here}):
            placed, offset = _fill([p for p in here if p.dtype == dtype], index, offset)
            entries += placed
        blocks.append(Block(device=device, nbytes=offset))
    return Layout(
        entries=tuple(entries),
        blocks=tuple(blocks),
        envelope=envelope,
        base_model=base_model,
        base_weights=base_weights or {},
    )


def _fill(places: Sequence[Place], block: int, offset: int) -> tuple[list[Entry], int]:
    entries = []
    for place in places:
        nbytes = math.prod(place.shape) * getattr(torch, place.dtype).itemsize
        entries.append(
            Entry(
                key=place.key,
                module=place.module,
                role=place.role,
                shape=place.shape,
                dtype=place.dtype,
                padding=place.padding,
                default=place.default,
                block=block,
                offset=offset,
                nbytes=nbytes,
            )
        )
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return entries, offset
