"""Finds the slots of a model, and keeps the model's ``state_dict`` true to the live adapters.

Slots are stored on the model itself, so they live as long as it does. A copy or a pickle of the
model has none, since its tensors are not views of any slot's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel

from . import layers, peft_internals, torch_internals
from .layout import Layout

_ATTRIBUTE = "_hotswap_slots"


class LiveImage(Protocol):
    """The fields of an image that a ``state_dict`` depends on; see `hotswap_lib.AdapterImage`."""

    @property
    def ranks(self) -> Mapping[str, int]: ...
    @property
    def written(self) -> Sequence[int]: ...


class RegisteredSlot(Protocol):
    """The part of `hotswap_lib.Slot` that this module uses."""

    model: PeftModel
    adapter_name: str
    layout: Layout

    @property
    def live(self) -> LiveImage: ...
    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...


class _Slots(dict[str, RegisteredSlot]):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Slots:
        return _Slots()

    def __reduce__(self) -> tuple[type[_Slots], tuple[()]]:
        return _Slots, ()


def slots(model: torch.nn.Module) -> Mapping[str, RegisteredSlot]:
    """Adapter name → slot. The model may be a PeftModel, its base model, or compiled."""
    return _slots(_owner(model))


def _owner(model: torch.nn.Module) -> torch.nn.Module:
    # the base model, which is reached from the PeftModel as well
    return layers.base_of(torch_internals.unwrap(model))


def register(slot: RegisteredSlot) -> None:
    """Store a slot on its model."""
    model = slot.model
    if not _slots(_owner(model)):
        hook: Any = model.register_state_dict_post_hook
        hook(_show_live_in_state_dict)
    _slots_to_fill(_owner(model))[slot.adapter_name] = slot
    for wrapper in layers.saved_modules(model, slot.adapter_name).values():
        saved: Any = peft_internals.copy_of(wrapper, slot.adapter_name)
        saved.register_state_dict_post_hook(_leave_out_unsaved)
        _slots_to_fill(saved)[slot.adapter_name] = slot


def _slots_to_fill(module: torch.nn.Module) -> _Slots:
    held: _Slots = vars(module).setdefault(_ATTRIBUTE, _Slots())
    return held


def _slots(module: torch.nn.Module) -> _Slots:
    found = vars(module).get(_ATTRIBUTE)
    return found if isinstance(found, _Slots) else _Slots()


def _show_live_in_state_dict(
    model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _metadata: Any
) -> None:
    show_live(model, state, prefix)


def show_live(model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Edit a model's state so that it shows the live adapters at their own ranks, without padding
    and without modules that they do not have. PEFT's save_pretrained writes this state.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for slot in slots(model).values():
        ranks, written = slot.live.ranks, set(slot.live.written)
        for index, entry in enumerate(slot.layout.entries):
            key = f"{prefix}{names.get(id(slot.tensors[entry.key]))}"
            # a base value stays: another adapter, or the base model itself, uses it
            if key not in state or entry.default == "base":
                continue
            if index not in written:
                del state[key]
            elif entry.padding is not None:
                state[key] = entry.padding.read(state[key], ranks[entry.module])


def _leave_out_unsaved(
    saved: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _metadata: Any
) -> None:
    """Removes a saved module that the live adapter does not have from the state."""
    for slot in _slots(saved).values():
        written = {id(slot.tensors[slot.layout.entries[i].key]) for i in slot.live.written}
        tensors = (*saved.parameters(), *saved.buffers())
        if not any(id(tensor) in written for tensor in tensors):
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
