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
from .sites import Site


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
    """

    def __init__(
        self,
        model: torch.nn.Module,
        found: Sequence[Site],
        bound: Mapping[str, torch.Tensor],
        layers: Mapping[str, LoraLayer],
    ) -> None:
        self._bound = bound
        self._pointers = {key: tensor.data_ptr() for key, tensor in bound.items()}
        self._layers = list(layers.values())
        parents: dict[int, tuple[torch.nn.Module, Link]] = {}
        for module in model.modules():
            for name, child in module._modules.items():
                if child is not None:
                    parents[id(child)] = module, (module._modules, name, child)
        self._links = {
            site.place.key: list(_links(site, bound[site.place.key], layers, parents))
            for site in found
        }

    def is_merged(self, adapter_name: str) -> bool:
        """Whether any layer has the adapter inside its base weight."""
        return any(adapter_name in layer.merged_adapters for layer in self._layers)

    def broken(self, entries: Sequence[Entry]) -> tuple[str, str] | None:
        """The first of these entries whose tensor is not the model's any more, and why."""
        seen: set[tuple[int, str]] = set()
        for entry in entries:
            key, tensor = entry.key, self._bound[entry.key]
            for mapping, name, expected in self._links[key]:
                if (id(mapping), name) in seen:
                    continue
                seen.add((id(mapping), name))
                held = mapping.get(name)
                # a layer may have been replaced by torch.compile's wrapper around it
                if held is not expected and getattr(held, "_orig_mod", None) is not expected:
                    return key, "the model holds something else in its place"
            if tensor.data_ptr() != self._pointers[key]:
                return key, "it points to other memory"
            dtype = getattr(torch, entry.dtype)
            if tensor.shape != entry.shape or tensor.dtype != dtype or not tensor.is_contiguous():
                stride = list(tensor.stride())
                return key, f"it became {tensor.dtype} {list(tensor.shape)}, stride {stride}"
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
