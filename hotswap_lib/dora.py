"""Plain LoRA in a DoRA layer: the magnitude with which DoRA computes what plain LoRA computes.

A DoRA layer scales its output by ``magnitude / norm(W + s·BA)`` (arXiv 2402.09353, eq. 5). With
the magnitude set to that very norm the factor is exactly 1, so adapters without DoRA, and no
adapter at all, fit into a slot that was prepared for DoRA. The norm comes from PEFT's own
functions on the layer itself, since a factor of 1 needs the same rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from .layer_kinds import kind


def neutral_magnitude(
    layer: LoraLayer, adapter_name: str, tensors: Mapping[str, torch.Tensor], scaling: torch.Tensor
) -> torch.Tensor:
    """The magnitude for which the factor is 1.

    Args:
        layer: the layer that will compute with it.
        adapter_name: PEFT's name of the adapter.
        tensors: role → the padded tensor that will be live.
        scaling: what will be live, 0-dim.

    Returns:
        a tensor of the shape of the layer's magnitude.
    """
    dora = layer.lora_magnitude_vector[adapter_name]
    base = layer.get_base_layer()
    with torch.no_grad():
        if kind(layer) == "layer.Embedding":
            weight = base.weight
            delta = dora.get_lora_weight(
                lora_A=tensors["lora_embedding_A"].T, lora_B=tensors["lora_embedding_B"].T
            )
        else:
            lora_a = _with(layer.lora_A[adapter_name], weight=tensors["lora_A.weight"])
            held = {"weight": tensors["lora_B.weight"], "bias": tensors.get("lora_B.bias")}
            lora_b = _with(layer.lora_B[adapter_name], **held)
            weight = dequantize_module_weight(base)
            weight = weight.to(tensors["lora_A.weight"].dtype) if weight.ndim == 2 else weight
            delta = dora.get_lora_weight(lora_A=lora_a, lora_B=lora_b)
            delta = delta.reshape(weight.shape) if weight.ndim > 2 else delta
        norm: torch.Tensor = dora.get_weight_norm(weight=weight, lora_weight=delta, scaling=scaling)
        return norm


def _with(module: torch.nn.Module, **parameters: torch.Tensor | None) -> torch.nn.Module:
    """The module over other parameters; the module itself is left alone."""
    other = copy.copy(module)
    other._parameters = dict.fromkeys(module._parameters) | parameters
    return other


def drop_cache(layer: LoraLayer, adapter_name: str) -> None:
    """Forget norms that PEFT may have kept from the weights before (``ENABLE_DORA_CACHING``)."""
    if adapter_name in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[adapter_name]._dora_cache.clear()
