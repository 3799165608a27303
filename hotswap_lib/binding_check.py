"""Detects a model that no longer reads its slot.

Moving or casting the model, deleting and loading the adapter, unloading PEFT: each of these leaves
a slot whose commits the model would not see. `BindingCheck` records every link from the model down
to each slot tensor and compares them later, which is faster than enumerating the tensors again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from peft.tuners.lora import LoraLayer

from . import peft_internals, torch_internals
from .layout import Entry
from .slot_tensors import SlotTensor


class _Holder(Protocol):
    def get(self, name: str, /) -> object: ...


Link = tuple[_Holder, str, object]


class BindingCheck:
    """The links to some slot tensors, recorded when the tensors were bound.

    Args:
        model: the model that is called; the links begin here.
        found: the places of the tensors in the model.
        bound: key → the tensor that is there.
        layers: module name → LoRA layer.
        entries: the tensors to check.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        found: Sequence[SlotTensor],
        bound: Mapping[str, torch.Tensor],
        *,
        layers: Mapping[str, LoraLayer],
        entries: Sequence[Entry],
    ) -> None:
        parents: dict[int, tuple[torch.nn.Module, Link]] = {}
        for module in model.modules():
            children = torch_internals.children(module)
            for name, child in children.items():
                if child is not None:
                    parents[id(child)] = module, (children, name, child)
        places = {one.place.key: one for one in found}
        links: dict[tuple[int, str], tuple[Link, str]] = {}
        for entry in entries:
            tensor = bound[entry.key]
            for link in _links(places[entry.key], tensor, layers, parents):
                links.setdefault((id(link[0]), link[1]), (link, entry.key))
        self._links = [(*link, key) for link, key in links.values()]
        self._tensors = [_Recorded(entry.key, bound[entry.key]) for entry in entries]

    def broken(self) -> tuple[str, str] | None:
        """The key of the first tensor that the model no longer reads, and why; None if all are."""
        for mapping, name, expected, key in self._links:
            held = mapping.get(name)
            # a layer may have been replaced by torch.compile's wrapper around it
            if held is not expected and not torch_internals.is_wrapper_of(held, expected):
                return key, "the model holds something else in its place"
        return next(((one.key, why) for one in self._tensors if (why := one.changed())), None)


class _Recorded:
    """A slot tensor, with the pointer, shape, stride and dtype that compiled code relies on."""

    __slots__ = ("_dtype", "_pointer", "_shape", "_stride", "_tensor", "key")

    def __init__(self, key: str, tensor: torch.Tensor) -> None:
        self.key, self._tensor, self._pointer = key, tensor, tensor.data_ptr()
        self._shape, self._stride, self._dtype = tensor.shape, tensor.stride(), tensor.dtype

    def changed(self) -> str | None:
        tensor = self._tensor
        if tensor.data_ptr() != self._pointer:
            return "it points to other memory"
        if tensor.dtype is not self._dtype or tensor.shape != self._shape:
            return f"it became {tensor.dtype} {list(tensor.shape)}"
        if tensor.stride() != self._stride:
            return f"its stride became {tensor.stride()}"
        return None


class _ScalingsOf:
    """A layer's current scalings: PEFT replaces the dict by copies of it."""

    def __init__(self, layer: LoraLayer) -> None:
        self._layer = layer

    def get(self, name: str) -> object:
        return peft_internals.scalings(self._layer).get(name)


def _links(
    found: SlotTensor,
    tensor: torch.Tensor,
    layers: Mapping[str, LoraLayer],
    parents: Mapping[int, tuple[torch.nn.Module, Link]],
) -> Iterator[Link]:
    """The links from the tensor up to the model."""
    if isinstance(found.holder, torch.nn.Module):
        owner = found.holder
        own = torch_internals.parameters(owner)
        yield own if found.name in own else torch_internals.buffers(owner), found.name, tensor
    else:
        owner = layers[found.place.module]
        yield _ScalingsOf(owner), found.name, tensor
    while id(owner) in parents:
        owner, link = parents[id(owner)]
        yield link
