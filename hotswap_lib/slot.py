"""The slot: the memory inside a model that compiled code reads. The last stage: commit.

`hotswap_lib.preparation` lays the slot out once. After that no tensor is replaced: a commit is one
copy per device into tensors whose pointers, shapes and dtypes never change. A commit does not wait
for forward passes: the caller commits between two of them.

Device memory at rest: the slot, the live image, the image before it. While staging, one more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from . import layers, peft_internals, slot_registry
from .binding_check import BindingCheck
from .envelope import Envelope
from .errors import (
    AdapterMerged,
    ForeignStaged,
    LayoutMismatch,
    NothingToRollBack,
    SlotTensorMoved,
    VerifyFailed,
)
from .image import AdapterImage
from .layout import Layout
from .revision import Revision
from .slot_memory import SlotMemory
from .slot_tensors import SlotTensor
from .staging import Staged, Stager


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The result of a commit or a rollback.

    Attributes:
        revision: live now.
        previous: live before.
        commit_us: microseconds that the copies took; on an accelerator, until they were done.
        image_bytes: bytes copied.
        copies: number of copies; one per device.
    """

    revision: Revision
    previous: Revision
    commit_us: float
    image_bytes: int
    copies: int


class Slot:
    """The swappable adapter of one prepared model. Made by `prepare`; thread-safe.

    Attributes:
        model: the PeftModel; compile it, or its layers, after `prepare`.
        adapter_name: PEFT's name of the adapter in that model.
        layout: the layout that `hotswap_lib.image.pack` packs for.
    """

    def __init__(
        self,
        model: PeftModel,
        layout: Layout,
        adapter_name: str,
        found: Sequence[SlotTensor],
        *,
        first: AdapterImage,
    ) -> None:
        self.model = model
        self.layout = layout
        self.adapter_name = adapter_name
        self._lock = threading.RLock()
        self._layers = layers.lora_layers(model, adapter_name)
        with torch.inference_mode(False):  # inference tensors could never be written to again
            self._memory = SlotMemory(layout)
            self._stager = Stager(
                layout,
                self._layers,
                adapter_name,
                devices=self._memory.devices,
                base_values={one.place.key: one.base_value for one in found},
            )
            self._current = self._stager.stage(first, slot=self)
            self._previous: Staged | None = None
            self._memory.write(self._current.blocks)
            # last, and nothing in it can fail: the model changes here
            self._tensors = self._memory.bind(found)
        self._binding = BindingCheck(
            model, found, self._tensors, layers=self._layers, entries=layout.entries
        )
        # an event that unbinds one tensor unbinds all: a commit checks one tensor of each block
        sample = list({e.block: e for e in layout.entries if e.padding is not None}.values())
        self._sample = BindingCheck(
            model, found, self._tensors, layers=self._layers, entries=sample
        )
        self._publish(self._current)

    @property
    def envelope(self) -> Envelope:
        """The bounds of the adapters that the slot accepts."""
        return self.layout.envelope

    @property
    def revision(self) -> Revision:
        """The revision that is live now."""
        return self._current.revision

    @property
    def live(self) -> AdapterImage:
        """The image that is live now."""
        return self._current.image

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Entry key → the tensor that the model holds. Read-only: only a commit writes them."""
        return self._tensors

    def stage(self, image: AdapterImage) -> Staged:
        """Check an image and bring it to the slot's devices; the live weights are untouched.

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
        self._refuse_unbound(self._binding)
        image.check()
        return self._stager.stage(image, slot=self)

    def commit(self, staged: Staged) -> Receipt:
        """Make a staged image live. Committing the live image again rewrites it.

        If it fails or is interrupted, the slot holds the old image or the new one, never a mix.

        Raises:
            ForeignStaged: it was staged by another slot.
            AdapterMerged, SlotTensorMoved: as `stage`.
        """
        if staged.slot is not self:
            raise ForeignStaged(str(staged.revision), "it was staged by another slot")
        with self._lock:
            before = self._current
            # committing the same adapter twice keeps the other one for a rollback
            again = staged.image.is_like(before.image)
            return self._make_live(staged, previous=self._previous if again else before)

    def rollback(self) -> Receipt:
        """Make the image before this one live again. A second rollback undoes the first.

        Raises:
            NothingToRollBack: there is no image before this one.
            AdapterMerged, SlotTensorMoved: as `stage`.
        """
        with self._lock:
            if self._previous is None:
                raise NothingToRollBack(str(self.revision))
            return self._make_live(self._previous, previous=self._current)

    def verify(self) -> None:
        """Compare the live bytes, scalings included, with those of the live image.

        Raises:
            VerifyFailed: names the first tensor that differs.
            SlotTensorMoved: the model no longer holds the slot's own tensors.
        """
        with self._lock:
            self.check_pinned()
            if difference := self._memory.difference(self._current.blocks):
                raise VerifyFailed(str(self.revision), *difference)

    def check_pinned(self) -> None:
        """Check that the model still holds every slot tensor, in the memory that compiled code
        reads.

        Raises:
            SlotTensorMoved: names the first one that is not.
        """
        if broken := self._binding.broken():
            raise SlotTensorMoved(str(self.revision), *broken)

    def _refuse_unbound(self, binding: BindingCheck) -> None:
        for layer in self._layers.values():
            if peft_internals.is_merged(layer, self.adapter_name):
                raise AdapterMerged(self.adapter_name)
        if broken := binding.broken():
            raise SlotTensorMoved(str(self.revision), *broken)

    def _make_live(self, staged: Staged, *, previous: Staged | None) -> Receipt:
        self._refuse_unbound(self._sample)
        before, before_that = self._current, self._previous
        try:
            self._memory.synchronize()  # a forward pass in flight must not read half of each
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
                copies=len(self._memory),
            )
        except BaseException:  # an interrupt as well: the old image again, whole
            self._copy(before)
            self._current, self._previous = before, before_that
            self._publish(before)
            raise

    def _copy(self, staged: Staged) -> None:
        self._memory.write(staged.blocks)
        if self.envelope.use_dora:
            for layer in self._layers.values():
                peft_internals.clear_norm_cache(layer, self.adapter_name)
        self._memory.synchronize()

    def _publish(self, staged: Staged) -> None:
        # compiled code may guard on the configuration object, so it is updated and not replaced
        peft_internals.publish_config(self.model, self.adapter_name, staged.config)
        for layer, alpha in zip(self._layers.values(), staged.alphas, strict=True):
            peft_internals.set_alpha(layer, self.adapter_name, alpha)


def find_slot(model: torch.nn.Module, adapter_name: str = "default") -> Slot | None:
    """The model's slot of this name, or None. The model may be compiled, or the base model."""
    found = slot_registry.slots(model).get(adapter_name)
    return found if isinstance(found, Slot) else None
