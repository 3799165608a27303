"""A slot's memory: one block of bytes per device, to which the model's slot tensors point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .layout import Block, Entry, Layout
from .memory import allocate
from .slot_tensors import SlotTensor


class SlotMemory:
    """The blocks of one slot. They are allocated once and never replaced.

    Blocks given to its methods are uint8, one dimension each, on the same devices.
    """

    def __init__(self, layout: Layout) -> None:
        self._entries = layout.entries
        self._arenas = [_arena(block) for block in layout.blocks]

    @property
    def devices(self) -> Sequence[torch.device]:
        """The device of each block."""
        return [arena.device for arena in self._arenas]

    def __len__(self) -> int:
        return len(self._arenas)

    def bind(self, found: Sequence[SlotTensor]) -> Mapping[str, torch.Tensor]:
        """Put views of the blocks in the model's places; returns key → the tensor that it holds."""
        entries = {entry.key: entry for entry in self._entries}
        bound = {}
        for one in found:
            entry = entries[one.place.key]
            bound[entry.key] = one.bind(entry.view(self._arenas[entry.block]))
        return bound

    def write(self, blocks: Sequence[torch.Tensor]) -> None:
        """Overwrite the blocks: one copy per device, which may still run when this returns."""
        for arena, block in zip(self._arenas, blocks, strict=True):
            arena.copy_(block)

    def synchronize(self) -> None:
        """Wait until the devices have done everything that was queued on them."""
        for arena in self._arenas:
            if arena.device.type not in ("cpu", "meta"):
                torch.accelerator.synchronize(arena.device)

    def difference(self, blocks: Sequence[torch.Tensor]) -> tuple[str, str] | None:
        """The key of the first tensor whose bytes differ from these, and why; None if none does."""
        for arena, block in zip(self._arenas, blocks, strict=True):
            # as int64, which is compared eight times faster than uint8
            if not arena.is_meta and not torch.equal(
                arena.view(torch.int64), block.view(torch.int64)
            ):
                return self._first_difference(blocks)
        return None

    def _first_difference(self, blocks: Sequence[torch.Tensor]) -> tuple[str, str]:
        for entry in self._entries:
            live, expected = _bytes(entry, self._arenas), _bytes(entry, blocks)
            if not live.is_meta and not torch.equal(live, expected):
                return entry.key, "its bytes are not those of the image"
        return "-", "bytes between two tensors are not zero"


def _bytes(entry: Entry, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return blocks[entry.block][entry.offset : entry.offset + entry.nbytes]


def _arena(block: Block) -> torch.Tensor:
    if block.device == "cpu":
        return torch.from_numpy(allocate(block.nbytes))
    return torch.zeros(block.nbytes, dtype=torch.uint8, device=block.device)
