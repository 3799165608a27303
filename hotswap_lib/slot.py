"""The slot: the memory inside a model that compiled code reads. The last stages: stage, commit.

`hotswap_lib.preparation` lays the slot out once. After that nothing is ever rebound: a commit is
one copy per device into tensors whose pointers, shapes and dtypes never change. What a commit
cannot do is wait for forward passes: whoever runs the model commits between two of them.

Device memory at rest: the slot, the live image, the image before it. While staging, one more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel

from . import injection as layers
from .binding_check import Bond
from .dora import drop_cache, neutral_magnitude
from .envelope import Envelope
from .errors import (
    AdapterMerged,
    ForeignStaged,
    LayoutMismatch,
    NothingToRollBack,
    SlotTensorMoved,
    VerifyFailed,
)
from .image import AdapterImage, as_tensor
from .layout import SCALING, Block, Entry, Layout
from .memory import allocate
from .revision import Revision
from .slot_tensors import Site
from .staging import Receipt, Staged, published


class Slot:
    """The swappable adapter of one prepared model. Made by `prepare`; safe to use from threads.

    Attributes:
        model: the PeftModel; compile it, or its layers, after `prepare`.
        adapter_name: PEFT's name of the adapter in that model.
        layout: what `hotswap_lib.image.pack` packs for.
    """

    def __init__(
        self,
        model: PeftModel,
        layout: Layout,
        adapter_name: str,
        found: Sequence[Site],
        *,
        first: AdapterImage,
    ) -> None:
        self.model = model
        self.layout = layout
        self.adapter_name = adapter_name
        self._lock = threading.RLock()
        self._layers = layers.lora_layers(model, adapter_name)
        self._may_rest = [(i, e) for i, e in enumerate(layout.entries) if e.rest != "zeros"]
        self._base = {site.place.key: site.resting for site in found}
        self._scalings: dict[tuple[int, str], list[Entry]] = {}
        for entry in layout.entries:
            if entry.is_scaling:
                self._scalings.setdefault((entry.block, entry.dtype), []).append(entry)
        with torch.inference_mode(False):  # inference tensors could never be written to again
            self._arenas = [_arena(block) for block in layout.blocks]
            self._current = self._beside(first)
            self._previous: Staged | None = None
            for arena, block in zip(self._arenas, self._current.blocks, strict=True):
                arena.copy_(block)
            entries = {entry.key: entry for entry in layout.entries}
            # last, and nothing in it can fail: the model changes here
            self._tensors = {
                (key := site.place.key): site.put(
                    entries[key].view(self._arenas[entries[key].block])
                )
                for site in found
            }
        self._bond = Bond(model, found, self._tensors, self._layers, layout.entries)
        # what unbinds a slot unbinds all of it: a commit looks at one tensor of each block
        one_of_each = {e.block: e for e in layout.entries if e.padding is not None}
        self._sample = Bond(model, found, self._tensors, self._layers, [*one_of_each.values()])
        self._publish(self._current)

    @property
    def envelope(self) -> Envelope:
        """What the slot accepts."""
        return self.layout.envelope

    @property
    def revision(self) -> Revision:
        """What is live now."""
        return self._current.revision

    @property
    def live(self) -> AdapterImage:
        """The image that is live now."""
        return self._current.image

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Entry key → the tensor that the model holds. Read them; only a commit writes them."""
        return self._tensors

    def stage(self, image: AdapterImage) -> Staged:
        """Check an image and bring it next to the slot; the live weights are untouched.

        On the CPU nothing is copied: the image's arrays are read-only, and the staged image keeps
        them alive, in Ray's object store too. (Unless the base model's values have to be filled in
        for saved modules, biases or DoRA magnitudes that the adapter does not have.)

        Raises:
            LayoutMismatch: it was packed for another layout.
            ImageCorrupted: its bytes are not the ones that were packed.
            AdapterMerged: the adapter is merged into the base model.
            SlotTensorMoved: the model was moved or cast, or its adapter deleted, since `prepare`.
        """
        if image.layout_fingerprint != self.layout.fingerprint:
            rule = (
                f"it was packed for layout {image.layout_fingerprint[:8]} and this slot has "
                f"layout {self.layout.fingerprint[:8]}"
            )
            raise LayoutMismatch(str(image.revision), rule)
        self._refuse_unbound(self._bond)
        image.check()
        return self._beside(image)

    def _beside(self, image: AdapterImage) -> Staged:
        blocks = [
            as_tensor(block).to(arena.device)
            for block, arena in zip(image.blocks, self._arenas, strict=True)
        ]
        self._let_rest(image, blocks)
        return Staged(
            image=image,
            blocks=tuple(blocks),
            config=published(image.config),
            alphas=self._alphas(image),
            slot=self,
        )

    def _alphas(self, image: AdapterImage) -> tuple[float, ...]:
        scalings: dict[str, float] = {}
        for (block, dtype), entries in self._scalings.items():
            typed = as_tensor(image.blocks[block]).view(getattr(torch, dtype))
            where = torch.tensor([entry.offset // typed.itemsize for entry in entries])
            values = typed[where].tolist()
            scalings.update(zip((entry.module for entry in entries), values, strict=True))
        rank = self.envelope.max_rank
        return tuple(scalings[module] * rank for module in self._layers)

    def _let_rest(self, image: AdapterImage, blocks: list[torch.Tensor]) -> None:
        written = set(image.written) if self._may_rest else ()
        resting = [entry for index, entry in self._may_rest if index not in written]
        for block in {entry.block for entry in resting}:
            if blocks[block].device.type == "cpu":  # still the image's own memory
                blocks[block] = blocks[block].clone()
        if any(entry.rest == "norm" for entry in resting):
            live: dict[str, dict[str, torch.Tensor]] = {}
            for entry in self.layout.entries:
                live.setdefault(entry.module, {})[entry.role] = entry.view(blocks[entry.block])
        for entry in resting:
            target = entry.view(blocks[entry.block])
            if entry.rest == "norm":
                layer, tensors = self._layers[entry.module], live[entry.module]
                target.copy_(neutral_magnitude(layer, self.adapter_name, tensors, tensors[SCALING]))
            else:
                values = self._base[entry.key]
                assert values is not None
                target.copy_(values)

    def commit(self, staged: Staged) -> Receipt:
        """Make a staged image live. Committing what is live already writes it again.

        Whatever interrupts it, the slot holds the one image or the other, never a mix.

        Raises:
            ForeignStaged: it was staged by another slot.
        """
        if staged.slot is not self:
            raise ForeignStaged(str(staged.revision), "it was staged by another slot")
        with self._lock:
            before = self._current
            # committing the same adapter twice keeps the way back to the other one
            again = staged.image.is_like(before.image)
            return self._make_live(staged, previous=self._previous if again else before)

    def rollback(self) -> Receipt:
        """Make the image before this one live again. A second rollback undoes the first.

        Raises:
            NothingToRollBack: nothing was live before.
        """
        with self._lock:
            if self._previous is None:
                raise NothingToRollBack(str(self.revision))
            return self._make_live(self._previous, previous=self._current)

    def verify(self) -> None:
        """Compare the live bytes, scalings included, with those of the image that is live.

        Raises:
            VerifyFailed: names the first tensor that differs.
            SlotTensorMoved: the model no longer holds the slot's own tensors.
        """
        with self._lock:
            self.check_pinned()
            for arena, block in zip(self._arenas, self._current.blocks, strict=True):
                # as int64, which is compared eight times faster than uint8
                if not arena.is_meta and not torch.equal(
                    arena.view(torch.int64), block.view(torch.int64)
                ):
                    self._report_difference()

    def check_pinned(self) -> None:
        """Prove that every slot tensor is the one that compiled code knows, where it was.

        Raises:
            SlotTensorMoved: names the first one that is not.
        """
        if broken := self._bond.broken():
            raise SlotTensorMoved(str(self.revision), *broken)

    def _refuse_unbound(self, bond: Bond) -> None:
        if any(self.adapter_name in layer.merged_adapters for layer in self._layers.values()):
            raise AdapterMerged(self.adapter_name)
        if broken := bond.broken():
            raise SlotTensorMoved(str(self.revision), *broken)

    def _make_live(self, staged: Staged, *, previous: Staged | None) -> Receipt:
        self._refuse_unbound(self._sample)
        before, before_that = self._current, self._previous
        try:
            self._synchronize()  # a forward pass in flight must not read half of each
            started = time.perf_counter_ns()
            self._copy(staged)
            commit_us = (time.perf_counter_ns() - started) / 1e3
            self._current, self._previous = staged, previous
            self._publish(staged)
            return Receipt(
                revision=staged.revision,
                previous=before.revision,
                commit_us=commit_us,
                image_bytes=self.layout.nbytes,
                copies=len(self._arenas),
            )
        except BaseException:  # an interrupt as well: the old image again, whole
            self._copy(before)
            self._current, self._previous = before, before_that
            self._publish(before)
            raise

    def _copy(self, staged: Staged) -> None:
        for arena, block in zip(self._arenas, staged.blocks, strict=True):
            arena.copy_(block)
        if self.envelope.use_dora:
            for layer in self._layers.values():
                drop_cache(layer, self.adapter_name)
        self._synchronize()

    def _synchronize(self) -> None:
        for arena in self._arenas:
            if arena.device.type not in ("cpu", "meta"):
                torch.accelerator.synchronize(arena.device)

    def _publish(self, staged: Staged) -> None:
        # One dict update on the existing object: compiled code may guard on which object it is,
        # and a reader sees the old fields or the new ones.
        vars(self.model.peft_config[self.adapter_name]).update(staged.config)
        for layer, alpha in zip(self._layers.values(), staged.alphas, strict=True):
            layer.lora_alpha[self.adapter_name] = alpha

    def _report_difference(self) -> None:
        for entry in self.layout.entries:
            live = self._arenas[entry.block][entry.offset : entry.offset + entry.nbytes]
            staged = self._current.blocks[entry.block]
            if not torch.equal(live, staged[entry.offset : entry.offset + entry.nbytes]):
                rule = "its bytes are not those of the image"
                raise VerifyFailed(str(self.revision), entry.key, rule)
        raise VerifyFailed(str(self.revision), "-", "bytes between two tensors are not zero")


def _arena(block: Block) -> torch.Tensor:
    if block.device == "cpu":
        return torch.from_numpy(allocate(block.nbytes))
    return torch.zeros(block.nbytes, dtype=torch.uint8, device=block.device)
