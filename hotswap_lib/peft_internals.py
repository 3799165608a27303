"""Every private or undocumented part of PEFT that this library uses, behind typed functions.

Not here: classes and functions that PEFT documents, and the containers that adapters are stored
in (``lora_A``, ``lora_B``, ``lora_embedding_A``, ``lora_embedding_B``), which are part of PEFT's
checkpoint format. tests/hotswap_lib/test_peft_internals.py fails with the reason when a new PEFT
changes one of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key

_LORA_PACKAGE = "peft.tuners.lora."
_Value = TypeVar("_Value")

# --- configurations ---------------------------------------------------------------------------


def in_pattern(pattern: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    """The value of a ``rank_pattern`` or ``alpha_pattern`` for a module.

    PEFT applies this rule inside its layer constructor and does not export it.
    """
    return pattern.get(get_pattern_key(list(pattern), module), default) if pattern else default


def is_target(config: LoraConfig, module: str) -> bool:
    """True if PEFT would put LoRA on a module of this name; PEFT's own rule is undocumented."""
    return bool(check_target_module_exists(config, module))


def publish_config(model: PeftModel, adapter_name: str, fields: Mapping[str, Any]) -> None:
    """Overwrite fields of the adapter's configuration in one dict update.

    The object stays the same, because compiled code may guard on it. ``setattr`` for each field
    would let a reader see old and new fields together.
    """
    vars(model.peft_config[adapter_name]).update(fields)


# --- injection --------------------------------------------------------------------------------


def inject_again(model: PeftModel, config: LoraConfig, adapter_name: str) -> None:
    """Replace an adapter's configuration and create its layers on the meta device.

    ``PeftModel.add_adapter`` refuses a name that exists, and ``get_peft_model`` returns another
    object; the tuner's undocumented methods keep the PeftModel and its other adapters.
    """
    model.peft_config[adapter_name] = config
    tuner = cast(Any, model.base_model)
    active = list(tuner.active_adapters)
    tuner.inject_adapter(tuner.model, adapter_name, low_cpu_mem_usage=True)
    # new layers have only this adapter active, whatever the model has
    tuner.set_adapter(active, inference_mode=True)


def restore_config(model: torch.nn.Module, adapter_name: str, config: Any) -> None:
    """Put back the configuration from before an injection, or remove what PEFT left behind.

    ``get_peft_model`` stores ``peft_config`` on the base model, and no public call removes it.
    """
    if isinstance(model, PeftModel):
        model.peft_config[adapter_name] = config
    elif hasattr(model, "peft_config"):
        del model.peft_config


# --- LoRA layers ------------------------------------------------------------------------------


def layer_kind(layer: LoraLayer) -> str:
    """A layer's class inside PEFT's lora package, for example ``bnb.Linear4bit``.

    By name, because importing the quantized classes imports their libraries.
    """
    return f"{type(layer).__module__}.{type(layer).__qualname__}".removeprefix(_LORA_PACKAGE)


def holds(layer: LoraLayer, adapter_name: str) -> bool:
    """True if the layer has this adapter; ``scaling`` is the one dict that every kind fills."""
    return adapter_name in layer.scaling


def scalings(layer: LoraLayer) -> MutableMapping[str, Any]:
    """Adapter name → factor of B·A; PEFT's setters refuse tensors, so the dict itself is used."""
    held: MutableMapping[str, Any] = layer.scaling
    return held


def replace_scalings(layer: LoraLayer, values: MutableMapping[str, Any]) -> None:
    """Store the layer's scalings in another dict; PEFT has no hook for assignments to them."""
    layer.scaling = values


def set_alpha(layer: LoraLayer, adapter_name: str, alpha: float) -> None:
    """Set the alpha from which ``set_scale`` and ``unscale_layer`` recompute the scaling.

    PEFT sets it only while it creates a layer.
    """
    layer.lora_alpha[adapter_name] = alpha


def is_merged(layer: LoraLayer, adapter_name: str) -> bool:
    """True while the adapter is merged; ``LoraLayer.merged`` does not name the adapter."""
    return adapter_name in layer.merged_adapters


def containers(layer: LoraLayer, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Attribute name and container of everything that the layer stores for this adapter.

    ``delete_adapter`` would also change which adapters are active.
    """
    # some layers list a container twice
    names = (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
    for attribute in dict.fromkeys(names):
        container = getattr(layer, attribute, None)
        if container is not None and hasattr(container, "keys") and adapter_name in container:
            yield attribute, container


def adapter_modules(layer: LoraLayer) -> Iterator[torch.nn.Module]:
    """All modules inside a layer that belong to adapters and not to the base layer."""
    for attribute in layer.adapter_layer_names:
        container = getattr(layer, attribute, None)
        if isinstance(container, torch.nn.Module):
            yield from container.modules()


# --- DoRA -------------------------------------------------------------------------------------


def magnitude_module(layer: LoraLayer, adapter_name: str) -> Any | None:
    """The module with a layer's DoRA magnitude, its ``weight``; None without DoRA.

    Only PEFT's checkpoint keys mention it.
    """
    held = layer.lora_magnitude_vector
    if adapter_name not in held:
        return None
    return held[adapter_name]


def weight_norm(
    magnitude: Any,
    *,
    weight: torch.Tensor,
    lora_A: torch.Tensor | torch.nn.Module,
    lora_B: torch.Tensor | torch.nn.Module,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """The norm by which PEFT divides the magnitude, with PEFT's own rounding.

    A norm that is computed in another way differs in its last bit.
    """
    delta = magnitude.get_lora_weight(lora_A=lora_A, lora_B=lora_B)
    if weight.ndim > 2:
        delta = delta.reshape(weight.shape)
    norm: torch.Tensor = magnitude.get_weight_norm(
        weight=weight, lora_weight=delta, scaling=scaling
    )
    return norm


def dequantized_weight(base_layer: torch.nn.Module) -> torch.Tensor:
    """A base layer's weight as PEFT's DoRA reads it, dequantized where it is quantized."""
    weight: torch.Tensor = dequantize_module_weight(base_layer)
    return weight


def clear_norm_cache(layer: LoraLayer, adapter_name: str) -> None:
    """Drop norms that PEFT cached (``peft.helpers.DoraCaching``).

    PEFT drops them only when the layer is trained.
    """
    magnitude = magnitude_module(layer, adapter_name)
    if magnitude is not None:
        magnitude._dora_cache.clear()


# --- saved modules ----------------------------------------------------------------------------


def has_copy(wrapper: ModulesToSaveWrapper, adapter_name: str) -> bool:
    """True if the adapter has its own copy of the wrapped module; PEFT has no public test."""
    return adapter_name in wrapper.modules_to_save


def copy_of(wrapper: ModulesToSaveWrapper, adapter_name: str) -> torch.nn.Module:
    """The adapter's own copy of the wrapped module; PEFT returns only the active adapter's."""
    module: torch.nn.Module = wrapper.modules_to_save[adapter_name]
    return module


def original_of(wrapper: ModulesToSaveWrapper) -> torch.nn.Module:
    """The base model's module inside the wrapper; PEFT has no public accessor."""
    module: torch.nn.Module = wrapper.original_module
    return module


def delete_copy(wrapper: ModulesToSaveWrapper, adapter_name: str) -> None:
    """Delete the adapter's copy; ``PeftModel.delete_adapter`` would delete its LoRA layers too."""
    active: Iterable[str] = wrapper.active_adapters
    wrapper.delete_adapter(adapter_name, list(active))
