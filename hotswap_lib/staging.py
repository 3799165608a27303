"""What stage and commit give back: an image beside its slot, and the receipt of a commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .image import AdapterImage
from .revision import Revision

if TYPE_CHECKING:
    from .slot import Slot


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staged:
    """An image beside the slot, checked, ready to commit any number of times.

    Attributes:
        image: what was staged. On the CPU its read-only memory is what a commit copies from.
        blocks: its bytes on the slot's devices (uint8, one dimension each), with the base model's
            values where the image has none.
        config: what ``peft_config`` has to say while it is live.
        alphas: for each LoRA layer, the alpha that gives its scaling at the slot's padded rank, for
            PEFT's set_scale and unscale_layer.
        slot: the one slot that takes it.
    """

    image: AdapterImage
    blocks: tuple[torch.Tensor, ...]
    config: Mapping[str, Any]
    alphas: tuple[float, ...]
    slot: Slot

    @property
    def revision(self) -> Revision:
        return self.image.revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a commit or a rollback did.

    Attributes:
        revision: live now.
        previous: live before.
        commit_us: microseconds that the copies took; on an accelerator, until they were done.
        image_bytes: bytes copied.
        copies: how many copies that were; one per device.
    """

    revision: Revision
    previous: Revision
    commit_us: float
    image_bytes: int
    copies: int


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """An image's configuration, in the types that LoraConfig keeps its fields in."""
    fields = dict(config)
    if isinstance(targets := fields["target_modules"], Sequence) and not isinstance(targets, str):
        fields["target_modules"] = set(targets)
    for field in ("rank_pattern", "alpha_pattern"):
        fields[field] = dict(fields[field] or {})
    fields["bias"] = fields["bias"] or "none"
    for field in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        fields[field] = bool(fields[field])
    return fields
