"""The swappable tensors of a model: where the model stores each one, and how to replace it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from . import peft_internals, torch_internals
from .digest import tensor_digest
from .envelope import Envelope
from .injection import refuse_offloaded
from .layer_kinds import is_embedding, padding, roles
from .layers import base_of, lora_layers, saved_modules
from .layout import BIAS, MAGNITUDE, PREFIX, SAVED, SCALING, Place


class Scalings(dict[str, Any]):
    """A LoRA layer's scalings; assignments write into the slot's tensors and never rebind them.

    PEFT's set_scale and unscale_layer, and diffusers' scale for one call, assign to the dict. In
    a plain dict that would leave the model with a scaling that no commit changes.
    """

    def copy(self) -> Scalings:
        """PEFT's rescale_adapter_scale keeps such a copy and puts it back."""
        return Scalings(self)

    def pin(self, name: str, tensor: torch.Tensor) -> None:
        """Make later assignments to this name write to this tensor."""
        super().__setitem__(name, tensor)

    def __setitem__(self, name: str, value: Any) -> None:
        held = self.get(name)
        # a copy of the model has no slot: its scalings are ordinary tensors
        if isinstance(held, torch.Tensor) and value is not held:
            held.copy_(torch.as_tensor(value))
        else:
            super().__setitem__(name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTensor:
    """One swappable tensor in a model.

    Attributes:
        place: its description for the layout.
        holder: the module, ParameterDict or dict that holds it.
        name: its name there.
        base_value: the base model's own value, for a place whose default is "base".
    """

    place: Place
    holder: Any
    name: str
    base_value: torch.Tensor | None = None

    def bind(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put a tensor in its place; returns the object that the model now holds."""
        if isinstance(self.holder, Scalings):
            self.holder.pin(self.name, tensor)
            return tensor
        is_module = isinstance(self.holder, torch.nn.Module)
        if is_module and self.name not in torch_internals.buffers(self.holder):
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        if isinstance(self.holder, torch.nn.ParameterDict):
            self.holder[self.name] = tensor
        else:
            setattr(self.holder, self.name, tensor)
        return tensor


def slot_tensors(
    model: PeftModel, envelope: Envelope, adapter_name: str, dtype: str | None = None
) -> Iterator[SlotTensor]:
    """Every swappable tensor: of the LoRA layers, biases, saved modules, and the scalings.

    ``dtype`` is the dtype of the adapter that the model came with, None without one.
    """
    layers = lora_layers(model, adapter_name)
    for name, layer in layers.items():
        yield from _lora_tensors(name, layer, envelope, adapter_name, dtype)
    if envelope.bias != "none":
        yield from _biases(model, layers, envelope)
    for name, wrapper in saved_modules(model, adapter_name).items():
        yield from _saved_tensors(name, wrapper, adapter_name)
    for name, layer in layers.items():
        # a number in PEFT; float32 is exact enough for anything narrower than float64
        is_double = _lora_dtype(layer, envelope, dtype) == "float64"
        yield SlotTensor(
            place=Place(
                key=f"{PREFIX}{name}.{SCALING}",
                module=name,
                role=SCALING,
                shape=(),
                dtype="float64" if is_double else "float32",
                device=_device(layer),
            ),
            holder=peft_internals.scalings(layer),
            name=adapter_name,
        )


def pin_scalings(model: PeftModel, adapter_name: str) -> None:
    """Replace the scalings of the adapter's layers by `Scalings`."""
    for layer in lora_layers(model, adapter_name).values():
        held = peft_internals.scalings(layer)
        if not isinstance(held, Scalings):
            peft_internals.replace_scalings(layer, Scalings(held))


def _lora_tensors(
    module: str, layer: LoraLayer, envelope: Envelope, adapter_name: str, dtype: str | None
) -> Iterator[SlotTensor]:
    dtype = _lora_dtype(layer, envelope, dtype)
    for role in roles(layer, lora_bias=envelope.lora_bias):
        holder, name = getattr(layer, role.container), adapter_name
        if role.attribute is not None:
            holder, name = holder[adapter_name], role.attribute
        yield SlotTensor(
            place=Place(
                key=f"{PREFIX}{module}.{role.suffix}",
                module=module,
                role=role.suffix,
                shape=_shape(holder, name),
                dtype=dtype,
                device=_device(layer),
                padding=padding(layer, role, envelope.max_rank),
            ),
            holder=holder,
            name=name,
        )
    magnitude = peft_internals.magnitude_module(layer, adapter_name)
    if magnitude is not None:
        yield SlotTensor(
            place=Place(
                key=f"{PREFIX}{module}.{MAGNITUDE}",
                module=module,
                role=MAGNITUDE,
                shape=_shape(magnitude, "weight"),
                dtype=dtype,
                device=_device(layer),
                default="norm",
            ),
            holder=magnitude,
            name="weight",
        )


def _biases(
    model: PeftModel, layers: dict[str, LoraLayer], envelope: Envelope
) -> Iterator[SlotTensor]:
    if envelope.bias == "lora_only":
        owners = {f"{name}.base_layer": layer.get_base_layer() for name, layer in layers.items()}
    else:
        inside = {id(m) for layer in layers.values() for m in peft_internals.adapter_modules(layer)}
        owners = {n: m for n, m in base_of(model).named_modules() if id(m) not in inside}
    for name, owner in owners.items():
        bias = torch_internals.parameters(owner).get("bias")
        if bias is not None:
            module = name.removesuffix(".base_layer")
            refuse_offloaded(module, owner, "bias")
            yield _base_tensor(f"{PREFIX}{name}.bias", module, BIAS, (owner, "bias"), bias)


def _saved_tensors(
    name: str, wrapper: ModulesToSaveWrapper, adapter_name: str
) -> Iterator[SlotTensor]:
    original = peft_internals.original_of(wrapper)
    for path, owner in peft_internals.copy_of(wrapper, adapter_name).named_modules():
        buffers = torch_internals.buffers(owner)
        saved_buffers = {
            n: b for n, b in buffers.items() if torch_internals.is_saved_buffer(owner, n)
        }
        for attribute, held in {**torch_internals.parameters(owner), **saved_buffers}.items():
            if held is not None:
                key = ".".join(filter(None, (f"{PREFIX}{name}", path, attribute)))
                base_value = getattr(original.get_submodule(path), attribute)
                yield _base_tensor(key, name, SAVED, (owner, attribute), base_value)


def _base_tensor(
    key: str, module: str, role: str, where: tuple[torch.nn.Module, str], base_value: torch.Tensor
) -> SlotTensor:
    place = Place(
        key=key,
        module=module,
        role=role,
        shape=tuple(base_value.shape),
        dtype=str(base_value.dtype).removeprefix("torch."),
        device=str(base_value.device),
        default="base",
    )
    holder, name = where
    return SlotTensor(place=place, holder=holder, name=name, base_value=base_value.detach())


def _lora_dtype(layer: LoraLayer, envelope: Envelope, dtype: str | None) -> str:
    if chosen := envelope.dtype or dtype:
        return chosen
    # PEFT's autocast_adapter_dtype: 16 bit base models get float32 LoRA weights
    return "float64" if _any_tensor(layer).dtype is torch.float64 else "float32"


def _shape(holder: Any, name: str) -> tuple[int, ...]:
    tensor = holder[name] if isinstance(holder, torch.nn.ParameterDict) else getattr(holder, name)
    return tuple(tensor.shape)


def _device(layer: LoraLayer) -> str:
    return str(_any_tensor(layer).device)


def _any_tensor(layer: LoraLayer) -> torch.Tensor:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    # some quantized layers have a qweight, or codes, and no weight
    tensor: torch.Tensor = next(iter((*base.parameters(), *base.buffers())))
    return tensor


def parameter_dtype(model: torch.nn.Module, adapter_name: str) -> str | None:
    """The dtype of the adapter's weights; None if the model has no such adapter."""
    for layer in lora_layers(model, adapter_name).values():
        for container in (layer.lora_A, layer.lora_embedding_A):
            if adapter_name in container:
                held = container[adapter_name]
                tensor = held.weight if isinstance(held, torch.nn.Module) else held
                return str(tensor.dtype).removeprefix("torch.")
    return None


def base_weights(model: PeftModel, adapter_name: str) -> dict[str, tuple[str, str]]:
    """Checkpoint key → dtype and digest of base weights that PEFT saves with an adapter.

    PEFT does so for LoRA on a model's input and output embeddings
    (peft.utils.save_and_load.get_peft_model_state_dict, save_embedding_layers). The digest is
    empty on the meta device.
    """
    base = base_of(model)
    ends = [getattr(base, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    found = {}
    for name, layer in lora_layers(model, adapter_name).items():
        if is_embedding(layer) or any(layer is end for end in ends):
            weight = layer.get_base_layer().weight
            digest = "" if weight.is_meta else tensor_digest(weight)
            dtype = str(weight.dtype).removeprefix("torch.")
            found[f"{PREFIX}{name}.base_layer.weight"] = (dtype, digest)
    return found
