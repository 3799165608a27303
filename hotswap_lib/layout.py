"""The layout: where every swappable tensor lies. prepare makes it, pack writes to it, stage
checks it.

One block of bytes per device holds all of that device's slot tensors, scalings included. Within a
block the entries are grouped by dtype, so a pass over one dtype is a pass over one range, and each
entry starts at a multiple of `ALIGNMENT` bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .envelope import Envelope

# Inductor clones inputs that are not 16-byte aligned on every call, and 64 is a cache line.
ALIGNMENT = 64
SCALING = "scaling"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor that wants a place: an entry before its offset is known."""

    key: str
    module: str
    role: str
    shape: tuple[int, ...]
    rank_dim: int | None
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One swappable tensor.

    Attributes:
        key: its key in a PEFT checkpoint; for a scaling, the module's key and ``.scaling``.
        module: the module's name as PEFT's rank and alpha patterns see it.
        role: the key's last part: ``lora_A.weight``, ``lora_B.weight``, ..., ``scaling``.
        shape: padded shape; ``()`` for a scaling.
        rank_dim: the dimension that is padded to the envelope's rank, None where there is none.
        dtype: ``"float32"`` and so on.
        block: which block it lies in, counted from 0.
        offset: bytes from the start of that block.
        nbytes: size, without the gap to the next entry.
    """

    key: str
    module: str
    role: str
    shape: tuple[int, ...]
    rank_dim: int | None
    dtype: str
    block: int
    offset: int
    nbytes: int

    @property
    def is_scaling(self) -> bool:
        return self.role == SCALING

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """This entry's tensor inside its block (uint8, one dimension): a view, not a copy."""
        raw = block[self.offset : self.offset + self.nbytes]
        # .data: to autograd and dynamo it is a tensor of its own, not a view of the arena
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
        envelope: what was asked for.
        base_model: the base model's name or path where it has one; for people to read.
        fingerprint: 64 hex characters; equal ones take each other's images byte for byte. Device
            names are left out, so that one image packed on the host serves replicas on cuda:0 and
            on cuda:1; how the entries are split into blocks is in. The base model's name is left
            out too, since the same model has other paths on other machines.
    """

    entries: tuple[Entry, ...]
    blocks: tuple[Block, ...]
    envelope: Envelope
    base_model: str | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", _fingerprint(self.entries, self.blocks))

    @property
    def nbytes(self) -> int:
        """Bytes of one image, over all blocks, alignment gaps included."""
        return sum(block.nbytes for block in self.blocks)


def _fingerprint(entries: Sequence[Entry], blocks: Sequence[Block]) -> str:
    table = [
        [e.key, e.module, e.role, e.shape, e.rank_dim, e.dtype, e.block, e.offset, e.nbytes]
        for e in entries
    ]
    sizes = [block.nbytes for block in blocks]
    return hashlib.sha256(json.dumps(["hotswap-layout-1", sizes, table]).encode()).hexdigest()


def lay_out(places: Iterable[Place], envelope: Envelope, *, base_model: str | None) -> Layout:
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
        entries=tuple(entries), blocks=tuple(blocks), envelope=envelope, base_model=base_model
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
                rank_dim=place.rank_dim,
                dtype=place.dtype,
                block=block,
                offset=offset,
                nbytes=nbytes,
            )
        )
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return entries, offset
