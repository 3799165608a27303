"""Staging: bring an image to the slot's devices and complete it. The third stage.

source → pack → stage → commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from .dora import neutral_magnitude
from .image import AdapterImage, as_tensor
from .layout import SCALING, Entry, Layout
from .revision import Revision


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staged:
    """An image on the slot's devices, checked, ready to commit any number of times.

    Attributes:
        image: the image that was staged. On the CPU a commit copies from its read-only memory.
        blocks: its bytes on the slot's devices (uint8, one dimension each), with the base model's
            values where the image has none.
        config: the fields of ``peft_config`` while it is live.
        alphas: for each LoRA layer, the alpha that gives its scaling at the slot's padded rank, for
            PEFT's set_scale and unscale_layer.
        slot: the slot that staged it; no other slot commits it.
    """

    image: AdapterImage
    blocks: tuple[torch.Tensor, ...]
    config: Mapping[str, Any]
    alphas: tuple[float, ...]
    slot: object

    @property
    def revision(self) -> Revision:
        """The revision of the image."""
        return self.image.revision


class Stager:
    """Completes images for one slot.

    Args:
        layout: the slot's layout.
        layers: module name → LoRA layer.
        adapter_name: PEFT's name of the adapter.
        devices: the device of each block.
        base_values: entry key → the base model's value, for entries whose default is "base".
    """

    def __init__(
        self,
        layout: Layout,
        layers: Mapping[str, LoraLayer],
        adapter_name: str,
        *,
        devices: Sequence[torch.device],
        base_values: Mapping[str, torch.Tensor | None],
    ) -> None:
        self._layout = layout
        self._layers = layers
        self._adapter_name = adapter_name
        self._devices = devices
        self._base_values = base_values
        self._with_default = [(i, e) for i, e in enumerate(layout.entries) if e.default != "zeros"]
        self._scalings: dict[tuple[int, str], list[Entry]] = {}
        for entry in layout.entries:
            if entry.is_scaling:
                self._scalings.setdefault((entry.block, entry.dtype), []).append(entry)

    def stage(self, image: AdapterImage, *, slot: object) -> Staged:
        """The image on the slot's devices; on the CPU without a copy where it is complete."""
        blocks = self._to_devices(image)
        self._fill_defaults(image, blocks)
        return Staged(
            image=image,
            blocks=tuple(blocks),
            config=_in_peft_types(image.config),
            alphas=self._alphas(image),
            slot=slot,
        )

    def _to_devices(self, image: AdapterImage) -> list[torch.Tensor]:
        return [
            as_tensor(block).to(device)
            for block, device in zip(image.blocks, self._devices, strict=True)
        ]

    def _fill_defaults(self, image: AdapterImage, blocks: list[torch.Tensor]) -> None:
        written = set(image.written) if self._with_default else ()
        missing = [entry for index, entry in self._with_default if index not in written]
        for block in {entry.block for entry in missing}:
            if blocks[block].device.type == "cpu":  # still the image's own memory
                blocks[block] = blocks[block].clone()
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        if any(entry.default == "norm" for entry in missing):
            for entry in self._layout.entries:
                tensors.setdefault(entry.module, {})[entry.role] = entry.view(blocks[entry.block])
        for entry in missing:
            if entry.default == "norm":
                value = self._neutral_magnitude(entry.module, tensors[entry.module])
            else:
                base_value = self._base_values[entry.key]
                assert base_value is not None
                value = base_value
            entry.view(blocks[entry.block]).copy_(value)

    def _neutral_magnitude(self, module: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        layer = self._layers[module]
        return neutral_magnitude(layer, self._adapter_name, tensors, tensors[SCALING])

    def _alphas(self, image: AdapterImage) -> tuple[float, ...]:
        scalings: dict[str, float] = {}
        for (block, dtype), entries in self._scalings.items():
            typed = as_tensor(image.blocks[block]).view(getattr(torch, dtype))
            where = torch.tensor([entry.offset // typed.itemsize for entry in entries])
            values = typed[where].tolist()
            scalings.update(zip((entry.module for entry in entries), values, strict=True))
        rank = self._layout.envelope.max_rank
        return tuple(scalings[module] * rank for module in self._layers)


def _in_peft_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """An image's configuration, in the types in which LoraConfig stores its fields."""
    fields = dict(config)
    if isinstance(targets := fields["target_modules"], Sequence) and not isinstance(targets, str):
        fields["target_modules"] = set(targets)
    for field in ("rank_pattern", "alpha_pattern"):
        fields[field] = dict(fields[field] or {})
    fields["bias"] = fields["bias"] or "none"
    for field in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        fields[field] = bool(fields[field])
    return fields
