"""The two functions of ``peft.utils.hotswap``, with the same signatures.

A caller of PEFT's functions only changes the import. `hotswap_adapter` returns a receipt, PEFT's
returns None.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel

from . import injection, layers, torch_internals
from .envelope import Envelope
from .errors import AlreadyCompiled, NotPrepared
from .image import pack
from .preparation import prepare, smallest_envelope
from .slot import Receipt, Slot, find_slot
from .source import Adapter

_LOAD_KEYWORDS = ("name", "revision", "token", "cache_dir", "subfolder")


def hotswap_adapter(
    model: torch.nn.Module,
    model_name_or_path: str | Path | Adapter,
    adapter_name: str = "default",
    torch_device: str | None = None,  # noqa: ARG001 (PEFT's signature)
    **kwargs: Any,
) -> Receipt:
    """Replace the live adapter by another one.

    Args:
        model: a prepared model, compiled or not; a PeftModel that is neither prepared nor
            compiled is prepared first, with the smallest envelope for the adapter that it has.
        model_name_or_path: any source that `hotswap_lib.load_adapter` reads.
        adapter_name: PEFT's name of the adapter to replace.
        torch_device: accepted and unused: the slot's tensors stay on their devices.
        **kwargs: ``name``, ``revision``, ``token``, ``cache_dir`` and ``subfolder``; the rest is
            ignored, as in PEFT's function.

    Raises:
        NotPrepared: the model is compiled and was not prepared before, or is not a PeftModel.
        AdapterRefused: the adapter does not fit; nothing has changed.
    """
    slot = find_slot(model, adapter_name) or _prepare_now(model, adapter_name)
    load = {key: kwargs[key] for key in _LOAD_KEYWORDS if kwargs.get(key) is not None}
    return slot.commit(slot.stage(pack(model_name_or_path, slot.layout, **load)))


def _prepare_now(model: torch.nn.Module, adapter_name: str) -> Slot:
    if not isinstance(torch_internals.unwrap(model), PeftModel):
        rule = "the model is not a PeftModel, and it was not prepared"
        raise NotPrepared(adapter_name, rule)
    try:
        return prepare(model, adapter_name=adapter_name)
    except AlreadyCompiled as error:
        rule = f"the model was not prepared, and it is too late now: {error}"
        raise NotPrepared(adapter_name, rule) from error


def prepare_model_for_compiled_hotswap(
    model: torch.nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare every LoRA adapter of a PeftModel; see `hotswap_lib.prepare`.

    Args:
        model: a PeftModel with its first adapters, before compile.
        target_rank: the envelope's highest rank; each adapter's own highest if left out.
        config: configurations whose ranks become ``target_rank``. The model's own ones are left
            alone: they describe the live adapter, and a swap updates them.
        check_compiled: for a compiled model: raise ("error"), warn, or ignore it.

    Raises:
        AlreadyCompiled, InvalidEnvelope, NotPrepared, AdapterRefused
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled is 'error', 'warn' or 'ignore', not {check_compiled!r}")
    try:
        injection.refuse_compiled(model)
    except AlreadyCompiled as error:
        if check_compiled == "error":
            raise
        if check_compiled == "warn":
            warnings.warn(str(error), stacklevel=2)
    target = torch_internals.unwrap(model)
    if not isinstance(target, PeftModel):
        raise NotPrepared("default", "the model is not a PeftModel with a first adapter")
    for adapter_name in list(target.peft_config):
        envelope = _envelope(target, adapter_name, target_rank)
        prepare(target, envelope=envelope, adapter_name=adapter_name, allow_compiled=True)
    if config is not None and target_rank is not None:
        configs = config.values() if isinstance(config, Mapping) else [config]
        _raise_ranks(configs, target_rank, own=list(target.peft_config.values()))


def _raise_ranks(configs: Iterable[Any], rank: int, *, own: Sequence[Any]) -> None:
    for config in configs:
        if not any(config is one for one in own):
            config.r = rank
            config.rank_pattern = dict.fromkeys(config.rank_pattern or {}, rank)


def _envelope(model: PeftModel, adapter_name: str, target_rank: int | None) -> Envelope | None:
    if target_rank is None or not layers.lora_layers(model, adapter_name):
        return None
    adapter = Adapter.from_peft_model(model, adapter_name)
    return smallest_envelope(model, adapter, adapter_name, max_rank=target_rank)
