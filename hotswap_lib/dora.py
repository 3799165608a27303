"""Plain LoRA in a DoRA layer: the magnitude with which DoRA computes the same as plain LoRA.

A DoRA layer scales its output by ``magnitude / norm(W + s·BA)`` (arXiv 2402.09353, eq. 5). With
the magnitude set to that norm the factor is exactly 1, so adapters without DoRA, and no adapter at
all, fit into a slot that was prepared for DoRA. PEFT's own functions compute the norm, because a
factor of exactly 1 needs the same rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer

from . import peft_internals
from .layer_kinds import is_embedding
from .torch_internals import with_parameters


def neutral_magnitude(
    layer: LoraLayer, adapter_name: str, tensors: Mapping[str, torch.Tensor], scaling: torch.Tensor
) -> torch.Tensor:
    """The magnitude for which the factor is 1.

    Args:
        layer: the layer that will compute with it.
        adapter_name: PEFT's name of the adapter.
        tensors: role → the padded tensor that will be live.
        scaling: the scaling that will be live, 0-dim.

    Returns:
        a tensor of the shape of the layer's magnitude.
    """
    magnitude = peft_internals.magnitude_module(layer, adapter_name)
    base = layer.get_base_layer()
    lora_A: torch.Tensor | torch.nn.Module
    lora_B: torch.Tensor | torch.nn.Module
    with torch.no_grad():
        if is_embedding(layer):
            weight = base.weight
            lora_A, lora_B = tensors["lora_embedding_A"].T, tensors["lora_embedding_B"].T
        else:
            weight = peft_internals.dequantized_weight(base)
            weight = weight.to(tensors["lora_A.weight"].dtype) if weight.ndim == 2 else weight
            lora_A = with_parameters(
                layer.lora_A[adapter_name], {"weight": tensors["lora_A.weight"]}
            )
            lora_B = with_parameters(
                layer.lora_B[adapter_name],
                {"weight": tensors["lora_B.weight"], "bias": tensors.get("lora_B.bias")},
            )
        return peft_internals.weight_norm(
            magnitude, weight=weight, lora_A=lora_A, lora_B=lora_B, scaling=scaling
        )
