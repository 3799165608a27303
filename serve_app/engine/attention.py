"""Attention as one opaque operation, so that whole decoder layers can be compiled.

Left to itself, dynamo looks into the paged attention of continuous batching: it guards on
`layer_idx`, compiles attention once for each layer until it hits its limit, and then silently runs
eager. Here a compiled layer sees one custom operation. What it needs beside query, key and value
(cache, lengths, block tables) is what the model was called with, and is picked up outside of the
graph; inside, transformers' own attention runs as ever.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "hotswap_paged"
_FOR_THE_MODEL = {"input_ids", "attention_mask", "use_cache", "logits_to_keep"}
_numbers = itertools.count()
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class _Call:
    """What a model was called with: everything that its attention layers get beside tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.proxy(model)
        self.mask: Any = None
        self.kwargs: dict[str, Any] = {}

    def remember(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask = kwargs.get("attention_mask")
        self.kwargs = {k: v for k, v in kwargs.items() if k not in _FOR_THE_MODEL}


def make_opaque(model: PreTrainedModel) -> bool:
    """Have every attention layer of `model` run as one operation; False when it cannot.

    The model must be called with keyword arguments, as continuous batching does.
    """
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
    if not layers or not model._supports_attention_backend:
        return False
    # only the layers get the other name: masks and caches go by the model's own config
    config = copy.copy(layers[0].config)
    config._attn_implementation = _NAME
    call = _Call(model)
    for layer in layers:
        number = next(_numbers)
        _modules[number] = layer
        layer.config = config
        layer._hotswap_call = call
        # a tensor, because dynamo guards on numbers; on the host, so that reading it is no sync
        layer._hotswap_number = torch.tensor(number)
    model.register_forward_pre_hook(call.remember, with_kwargs=True)
    return True


def _attention(  # transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # noqa: ARG001
    dropout: float = 0.0,  # noqa: ARG001
    scaling: float | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """What a layer calls: query, key, value of (1, heads, tokens, head size)."""
    out = paged_attention(
        query, key, value, module._hotswap_number, scaling, sliding_window, softcap, s_aux
    )
    return out, None


@torch.library.custom_op("hotswap::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    number: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of layer `number` in the current call. Returns (1, tokens, heads, head size).

    It also writes key and value into the paged cache, which no graph knows of.
    """
    module = _modules[int(number)]
    call: _Call = module._hotswap_call  # type: ignore[assignment]
    mask = call.mask
    if isinstance(mask, dict):  # one for each kind of layer
        mask = mask[module.config.layer_types[module.layer_idx]]  # type: ignore[union-attr,index]
    given = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
    given = {name: value for name, value in given.items() if value is not None}
    forward = ALL_ATTENTION_FUNCTIONS[call.model.config._attn_implementation]
    out: Tensor
    out, _ = forward(module, query, key, value, mask, scaling=scaling, **call.kwargs, **given)
    return out.contiguous()


@paged_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens, _size = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


AttentionInterface.register(_NAME, _attention)
