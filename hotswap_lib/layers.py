"""Find the LoRA layers and saved modules inside a model."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from . import peft_internals


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a PeftModel, whose module names are those in PEFT's patterns."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lora_layers(model: torch.nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Module name in PEFT's patterns → layer, for the layers that hold this adapter."""
    return {
        name: layer
        for name, layer in base_of(model).named_modules()
        if isinstance(layer, LoraLayer) and peft_internals.holds(layer, adapter_name)
    }


def saved_modules(model: torch.nn.Module, adapter_name: str) -> dict[str, ModulesToSaveWrapper]:
    """Module name → wrapper, for the modules of which this adapter has its own copy."""
    return {
        name: module
        for name, module in base_of(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        and peft_internals.has_copy(module, adapter_name)
    }
