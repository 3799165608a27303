"""What `prepare` leaves on a model: the way back to its slots, and a truthful ``state_dict``.

Nothing else stores or looks up the slots of a model. They hang on the model itself, so they live
as long as it does; a copy or a pickle of the model comes without them, since its tensors are no
longer views of any arena.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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
    return _slots(getattr(model, "_orig_mod", model)).get(adapter_name)


def attach(slot: Slot) -> None:
    """Make a slot findable from its model."""
    model = slot.model
    if _ATTRIBUTE not in vars(model):
        vars(model)[_ATTRIBUTE] = _Slots()
        model.register_state_dict_post_hook(_unpad)
    _slots(model)[slot.adapter_name] = slot


def _slots(model: torch.nn.Module) -> _Slots:
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, _Slots) else _Slots()


def _unpad(
    model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _metadata: Any
) -> None:
    """Show the live adapter as it is: own rank, own modules. PEFT's save_pretrained reads this."""
    for slot in _slots(model).values():
        ranks = slot.live.ranks
        for entry in slot.layout.entries:
            if entry.is_scaling:
                continue
            container, attribute = entry.role.split(".")
            stem = entry.key.removesuffix(entry.role)
            key = f"{prefix}{stem}{container}.{slot.adapter_name}.{attribute}"
            if key not in state:
                continue
            if entry.module not in ranks:
                del state[key]
            elif entry.rank_dim is not None:
                state[key] = state[key].narrow(entry.rank_dim, 0, ranks[entry.module])
