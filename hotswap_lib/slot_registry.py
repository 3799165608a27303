"""What `prepare` leaves on a model: the way back to its slots, and a truthful ``state_dict``.

Nothing else stores or looks up the slots of a model. They hang on the model itself, so they live
as long as it does; a copy or a pickle of the model comes without them, since its tensors are no
longer views of any arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import injection as layers

if TYPE_CHECKING:
    from .slot import Slot

_ATTRIBUTE = "_hotswap_slots"


class _Slots(dict[str, "Slot"]):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Slots:
        return _Slots()

    def __reduce__(self) -> tuple[type[_Slots], tuple[()]]:
        return _Slots, ()


def find_slot(model: torch.nn.Module, adapter_name: str) -> Slot | None:
    """The model's slot, looked up through ``torch.compile``'s wrapper; None without one."""
    return _slots(_home(model)).get(adapter_name)


def slots(model: torch.nn.Module) -> Sequence[Slot]:
    """All slots of a model."""
    return tuple(_slots(_home(model)).values())


def _home(model: torch.nn.Module) -> torch.nn.Module:
    # the model inside the PeftModel, so that it leads to its slots as well
    return layers.base_of(getattr(model, "_orig_mod", model))


def attach(slot: Slot) -> None:
    """Make a slot findable from its model."""
    model = slot.model
    if not _slots(_home(model)):
        hook: Any = model.register_state_dict_post_hook
        hook(_show_in_state_dict)
    _of(_home(model))[slot.adapter_name] = slot
    for wrapper in layers.saved_modules(model, slot.adapter_name).values():
        saved = wrapper.modules_to_save[slot.adapter_name]
        saved.register_state_dict_post_hook(_leave_out_unsaved)
        _of(saved)[slot.adapter_name] = slot


def _of(module: torch.nn.Module) -> _Slots:
    held: _Slots = vars(module).setdefault(_ATTRIBUTE, _Slots())
    return held


def _slots(module: torch.nn.Module) -> _Slots:
    found = vars(module).get(_ATTRIBUTE)
    return found if isinstance(found, _Slots) else _Slots()


def _show_in_state_dict(
    model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _metadata: Any
) -> None:
    show_as_live(model, state, prefix)


def show_as_live(model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Change a model's state so that it shows the live adapters as they are: own rank, own
    modules. What PEFT's save_pretrained writes is made from this.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for slot in slots(model):
        ranks, written = slot.live.ranks, set(slot.live.written)
        for index, entry in enumerate(slot.layout.entries):
            key = f"{prefix}{names.get(id(slot.tensors[entry.key]))}"
            if key not in state or entry.rest == "base":  # always there, with somebody's values
                continue
            if index not in written:
                del state[key]
            elif entry.padding is not None:
                state[key] = entry.padding.read(state[key], ranks[entry.module])


def _leave_out_unsaved(
    saved: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _metadata: Any
) -> None:
    """A saved module that the live adapter does not have is not written by save_pretrained."""
    for slot in _slots(saved).values():
        written = {id(slot.tensors[slot.layout.entries[i].key]) for i in slot.live.written}
        tensors = (*saved.parameters(), *saved.buffers())
        if not any(id(tensor) in written for tensor in tensors):
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
