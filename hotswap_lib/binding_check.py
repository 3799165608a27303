"""The bond between a model and its slot: every link from the model down to each slot tensor.

Moving or casting the model, deleting and loading the adapter, unloading PEFT: each of these leaves
a slot whose commits the model would not see. A look at the links finds that out in less time than
enumerating the model's tensors again would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from peft.tuners.lora import LoraLayer

from .layout import Entry
from .slot_tensors import Site


class _Holder(Protocol):
    def get(self, name: str, /) -> object: ...


Link = tuple[_Holder, str, object]


class Bond:
    """Made when the slot's tensors are in their places; says later whether they still are.

    Args:
        model: what is called; the links begin here.
        found: where the model keeps each tensor.
        bound: key → the tensor that is there.
        layers: module name → LoRA layer.
        entries: the tensors to look at, each with what is above it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        found: Sequence[Site],
        bound: Mapping[str, torch.Tensor],
        layers: Mapping[str, LoraLayer],
        entries: Sequence[Entry],
    ) -> None:
        parents: dict[int, tuple[torch.nn.Module, Link]] = {}
        for module in model.modules():
            for name, child in module._modules.items():
                if child is not None:
                    parents[id(child)] = module, (module._modules, name, child)
        sites = {site.place.key: site for site in found}
        links: dict[tuple[int, str], tuple[Link, str]] = {}
        for entry in entries:
            tensor = bound[entry.key]
            for link in _links(sites[entry.key], tensor, layers, parents):
                links.setdefault((id(link[0]), link[1]), (link, entry.key))
        self._links = [(*link, key) for link, key in links.values()]
        self._tensors = [_Bound(entry.key, bound[entry.key]) for entry in entries]

    def broken(self) -> tuple[str, str] | None:
        """The first tensor that is not the model's any more, and why."""
        for mapping, name, expected, key in self._links:
            held = mapping.get(name)
            # a layer may have been replaced by torch.compile's wrapper around it
            if held is not expected and getattr(held, "_orig_mod", None) is not expected:
                return key, "the model holds something else in its place"
        return next(((one.key, why) for one in self._tensors if (why := one.changed())), None)


class _Bound:
    """A slot tensor, and what compiled code knows of it."""

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
    """A layer's scalings, whichever dict they are in: PEFT puts copies of it in its place."""

    def __init__(self, layer: LoraLayer) -> None:
        self._layer = layer

    def get(self, name: str) -> object:
        return self._layer.scaling.get(name)


def _links(
    site: Site,
    tensor: torch.Tensor,
    layers: Mapping[str, LoraLayer],
    parents: Mapping[int, tuple[torch.nn.Module, Link]],
) -> Iterator[Link]:
    """From the tensor up to the model."""
    if isinstance(site.holder, torch.nn.Module):
        owner = site.holder
        mapping = owner._parameters if site.name in owner._parameters else owner._buffers
        yield mapping, site.name, tensor
    else:
        owner = layers[site.place.module]
        yield _ScalingsOf(owner), site.name, tensor
    while id(owner) in parents:
        owner, link = parents[id(owner)]
        yield link
