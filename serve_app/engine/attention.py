"""Attention as one opaque operation, so that whole decoder layers can be compiled.

Without this, dynamo traces into the paged attention of continuous batching: it guards on
`layer_idx`, compiles attention once for each layer until it hits the recompile limit, and then
silently runs eager. Here a compiled layer sees one custom operation. The other arguments of
attention (cache, lengths, block tables) are those of the model's call. They are read outside of
the graph, and transformers' own attention runs unchanged.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from serve_app.engine.transformers_internals import (
    attention_layers,
    attention_of,
    mask_for,
    set_layer_attention,
)

_NAME = "hotswap_paged"
_FOR_THE_MODEL = {"input_ids", "attention_mask", "use_cache", "logits_to_keep"}


class _Call:
    """The arguments of the current call of a model that its attention layers receive as well."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.proxy(model)
        self.layers: list[_Layer] = []
        self.mask: Any = None
        self.kwargs: dict[str, Any] = {}

    def remember(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask = kwargs.get("attention_mask")
        self.kwargs = {k: v for k, v in kwargs.items() if k not in _FOR_THE_MODEL}


@dataclass(eq=False)
class _Layer:
    """An attention layer of a model, and the model's current call."""

    module: nn.Module
    call: _Call


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, _Layer] = weakref.WeakValueDictionary()  # by number


def make_opaque(model: PreTrainedModel) -> bool:
    """Has every attention layer of `model` run as one operation; False if it cannot.

    The model must be called with keyword arguments, as continuous batching does.
    """
    layers = attention_layers(model)
    if not layers:
        return False
    AttentionInterface.register(_NAME, _attention)
    set_layer_attention(layers, _NAME)
    call = _Call(model)
    for module in layers:
        number = next(_numbers)
        _layers[number] = layer = _Layer(module, call)
        call.layers.append(layer)  # the model keeps its hook, the hook its call, the call these
        # an attribute of ours on the layer, which is all that `_attention` gets; a tensor, because
        # dynamo guards on numbers; on the host, so that reading it does not wait for the device
        module.hotswap_layer_number = torch.tensor(number)
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
    """The attention function of a layer. Query, key, value: (1, heads, tokens, head size)."""
    number: Any = module.hotswap_layer_number
    out = paged_attention(query, key, value, number, scaling, sliding_window, softcap, s_aux)
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

    It also writes key and value into the paged cache, of which no graph knows.
    """
    layer = _layers[int(number)]
    call = layer.call
    given = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
    given = {name: value for name, value in given.items() if value is not None}
    forward, mask = attention_of(call.model), mask_for(layer.module, call.mask)
    out: Tensor
    out, _ = forward(layer.module, query, key, value, mask, scaling=scaling, **call.kwargs, **given)
    return out.contiguous()


@paged_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens, _size = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])
