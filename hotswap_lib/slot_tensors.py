"""Sites: where a model keeps each of its swappable tensors, and how to put another one there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from .digest import tensor_digest
from .envelope import Envelope
from .injection import base_of, lora_layers, refuse_offloaded, saved_modules
from .layer_kinds import kind, padding, roles
from .layout import BIAS, MAGNITUDE, PREFIX, SAVED, SCALING, Place


class Scalings(dict[str, Any]):
    """A LoRA layer's scalings, of which a slot's are written into the slot and never rebound.

    PEFT's set_scale and unscale_layer, and diffusers' scale for one call, assign to the dict. That
    would leave the model with a scaling that no commit reaches.
    """

    def copy(self) -> Scalings:
        """PEFT's rescale_adapter_scale keeps such a copy and puts it back."""
        return Scalings(self)

    def pin(self, name: str, tensor: torch.Tensor) -> None:
        """Let assignments to this name write to this tensor from now on."""
        super().__setitem__(name, tensor)

    def __setitem__(self, name: str, value: Any) -> None:
        held = self.get(name)
        # copies of the model come without slots: what they hold is a tensor as any other
        if isinstance(held, torch.Tensor) and value is not held:
            held.copy_(torch.as_tensor(value))
        else:
            super().__setitem__(name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One swappable tensor where the model keeps it.

    Attributes:
        place: what the layout has to know about it.
        holder: the module, ParameterDict or dict that holds it.
        name: its name there.
        resting: the base model's own values, for a place whose rest is "base".
    """

    place: Place
    holder: Any
    name: str
    resting: torch.Tensor | None = None

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bind a tensor there; returns what the model now holds."""
        if isinstance(self.holder, Scalings):
            self.holder.pin(self.name, tensor)
            return tensor
        if isinstance(self.holder, torch.nn.Module) and self.name not in self.holder._buffers:
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        if isinstance(self.holder, torch.nn.ParameterDict):
            self.holder[self.name] = tensor
        else:
            setattr(self.holder, self.name, tensor)
        return tensor


def sites(
    model: PeftModel, envelope: Envelope, adapter_name: str, dtype: str | None = None
) -> Iterator[Site]:
    """Every swappable tensor: of the LoRA layers, biases, saved modules, and the scalings.

    ``dtype`` is the dtype of the adapter that the model came with, if it came with one.
    """
    layers = lora_layers(model, adapter_name)
    for name, layer in layers.items():
        yield from _lora_sites(name, layer, envelope, adapter_name, dtype)
    if envelope.bias != "none":
        yield from _bias_sites(model, layers, envelope)
    for name, wrapper in saved_modules(model, adapter_name).items():
        yield from _saved_sites(name, wrapper, adapter_name)
    for name, layer in layers.items():
        yield Site(
            place=Place(
                key=f"{PREFIX}{name}.{SCALING}",
                module=name,
                role=SCALING,
                shape=(),
                # a number to PEFT; float32 is exact enough beside anything narrower
                dtype="float64" if _lora_dtype(layer, envelope, dtype) == "float64" else "float32",
                device=_device(layer),
            ),
            holder=layer.scaling,
            name=adapter_name,
        )


def pin_scalings(model: PeftModel, adapter_name: str) -> None:
    """Give the adapter's layers scalings that a slot can hold on to."""
    for layer in lora_layers(model, adapter_name).values():
        if not isinstance(layer.scaling, Scalings):
            layer.scaling = Scalings(layer.scaling)


def _lora_sites(
    module: str, layer: LoraLayer, envelope: Envelope, adapter_name: str, dtype: str | None
) -> Iterator[Site]:
    dtype = _lora_dtype(layer, envelope, dtype)
    for role in roles(layer, lora_bias=envelope.lora_bias):
        holder, name = getattr(layer, role.container), adapter_name
        if role.attribute is not None:
            holder, name = holder[adapter_name], role.attribute
        site = Site(
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
        yield site
    if adapter_name in layer.lora_magnitude_vector:
        holder = layer.lora_magnitude_vector[adapter_name]
        yield Site(
            place=Place(
                key=f"{PREFIX}{module}.{MAGNITUDE}",
                module=module,
                role=MAGNITUDE,
                shape=_shape(holder, "weight"),
                dtype=dtype,
                device=_device(layer),
                rest="norm",
            ),
            holder=holder,
            name="weight",
        )


def _lora_dtype(layer: LoraLayer, envelope: Envelope, dtype: str | None) -> str:
    return envelope.dtype or dtype or _default_dtype(layer)


def _bias_sites(
    model: PeftModel, layers: dict[str, LoraLayer], envelope: Envelope
) -> Iterator[Site]:
    if envelope.bias == "lora_only":
        owners = {f"{name}.base_layer": layer.get_base_layer() for name, layer in layers.items()}
    else:
        inside = {id(m) for layer in layers.values() for m in _adapter_modules(layer)}
        owners = {n: m for n, m in base_of(model).named_modules() if id(m) not in inside}
    for name, owner in owners.items():
        bias = owner._parameters.get("bias")
        if bias is not None:
            module = name.removesuffix(".base_layer")
            refuse_offloaded(module, owner, "bias")
            yield _base_site(f"{PREFIX}{name}.bias", module, BIAS, owner, "bias", bias)


def _adapter_modules(layer: LoraLayer) -> Iterator[torch.nn.Module]:
    for attribute in layer.adapter_layer_names:
        container = getattr(layer, attribute, None)
        if isinstance(container, torch.nn.Module):
            yield from container.modules()


def _saved_sites(name: str, wrapper: ModulesToSaveWrapper, adapter_name: str) -> Iterator[Site]:
    for path, owner in wrapper.modules_to_save[adapter_name].named_modules():
        original = wrapper.original_module.get_submodule(path)
        for attribute in (*owner._parameters, *owner._buffers):
            if owner._parameters.get(attribute, owner._buffers.get(attribute)) is None:
                continue
            if attribute not in owner._non_persistent_buffers_set:
                key = ".".join(filter(None, (f"{PREFIX}{name}", path, attribute)))
                yield _base_site(key, name, SAVED, owner, attribute, getattr(original, attribute))


def _base_site(
    key: str, module: str, role: str, holder: torch.nn.Module, name: str, resting: torch.Tensor
) -> Site:
    place = Place(
        key=key,
        module=module,
        role=role,
        shape=tuple(resting.shape),
        dtype=str(resting.dtype).removeprefix("torch."),
        device=str(resting.device),
        rest="base",
    )
    return Site(place=place, holder=holder, name=name, resting=resting.detach())


def _shape(holder: Any, name: str) -> tuple[int, ...]:
    tensor = holder[name] if isinstance(holder, torch.nn.ParameterDict) else getattr(holder, name)
    return tuple(tensor.shape)


def _device(layer: LoraLayer) -> str:
    return str(_any_tensor(layer).device)


def _default_dtype(layer: LoraLayer) -> str:
    # PEFT's autocast_adapter_dtype: 16 bit base models get float32 LoRA weights
    return "float64" if _any_tensor(layer).dtype is torch.float64 else "float32"


def _any_tensor(layer: LoraLayer) -> torch.Tensor:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    # some quantized layers have a qweight, or codes, and no weight
    tensor: torch.Tensor = next(iter((*base.parameters(), *base.buffers())))
    return tensor


def parameter_dtype(model: torch.nn.Module, adapter_name: str) -> str | None:
    """The dtype of the adapter's weights, None where the model has no such adapter."""
    for layer in lora_layers(model, adapter_name).values():
        for container in (layer.lora_A, layer.lora_embedding_A):
            if adapter_name in container:
                held = container[adapter_name]
                tensor = held.weight if isinstance(held, torch.nn.Module) else held
                return str(tensor.dtype).removeprefix("torch.")
    return None


def base_weights(model: PeftModel, adapter_name: str) -> dict[str, tuple[str, str]]:
    """Checkpoint key → dtype and digest of the base weights that PEFT saves beside LoRA on a
    model's input and output embeddings (peft.utils.save_and_load.get_peft_model_state_dict,
    save_embedding_layers).
    """
    base = base_of(model)
    ends = [getattr(base, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    found = {}
    for name, layer in lora_layers(model, adapter_name).items():
        if kind(layer) == "layer.Embedding" or any(layer is end for end in ends):
            weight = layer.get_base_layer().weight
            digest = "" if weight.is_meta else tensor_digest(weight)
            dtype = str(weight.dtype).removeprefix("torch.")
            found[f"{PREFIX}{name}.base_layer.weight"] = (dtype, digest)
    return found
