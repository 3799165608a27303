"""Preparation: give a model its slot. Comes before every other stage, and before compile.

If `prepare` raises, the model is as it was before.
"""

from __future__ import annotations

import torch
from peft import PeftModel

from . import injection, layers, peft_internals, slot_registry, torch_internals
from . import slot_tensors as tensors
from .envelope import Envelope
from .errors import InvalidEnvelope, NotPrepared
from .image import null_image, pack
from .layout import lay_out
from .slot import Slot, find_slot
from .source import Adapter


def prepare(
    model: torch.nn.Module,
    *,
    envelope: Envelope | None = None,
    adapter_name: str = "default",
    allow_compiled: bool = False,
) -> Slot:
    """Give a model its slot. Call it once, before compiling; it changes the model in place.

    Args:
        model: a model without adapters, whose outputs stay the same until the first commit, or a
            PeftModel, whose adapter becomes the first live revision.
        envelope: the bounds for adapters; by default the smallest one for the PeftModel's adapter.
        adapter_name: PEFT's name for the adapter.
        allow_compiled: skip the check for compiled modules, as PEFT's function allows.

    Returns:
        the slot; ``slot.model`` is the PeftModel, the given object if it was one. The model is in
        evaluation mode and its LoRA weights need no gradient. Preparing a model again returns its
        slot.

    Raises:
        AlreadyCompiled: the model, or a module in it, is compiled.
        InvalidEnvelope: the model cannot hold such an envelope.
        NotPrepared: the PeftModel has no such adapter, or it is merged.
        AdapterRefused: the PeftModel's adapter is not inside the envelope.
    """
    slot = find_slot(model, adapter_name)
    if slot is not None and envelope in (None, slot.envelope):
        return slot
    if slot is not None:
        raise InvalidEnvelope("max_rank", "the model was prepared with another envelope")
    _refuse_unpreparable(model, adapter_name, allow_compiled=allow_compiled)
    adapter = _first_adapter(model, adapter_name) if isinstance(model, PeftModel) else None
    envelope = envelope or _default_envelope(model, adapter, adapter_name)
    _refuse_shared_biases(model, envelope, adapter, adapter_name)
    slot = _build(model, envelope, adapter, adapter_name)
    slot_registry.register(slot)
    return slot


def _refuse_unpreparable(
    model: torch.nn.Module, adapter_name: str, *, allow_compiled: bool
) -> None:
    if not allow_compiled:
        injection.refuse_compiled(model)
    if torch_internals.freezes_weights():
        rule = "inductor's freezing is on, which copies weights into compiled code permanently"
        raise NotPrepared(adapter_name, rule)
    injection.refuse_foreign(model, adapter_name)


def _first_adapter(model: PeftModel, adapter_name: str) -> Adapter:
    if adapter_name not in model.peft_config:
        raise NotPrepared(adapter_name, f"the model has adapters {sorted(model.peft_config)}")
    for layer in layers.lora_layers(model, adapter_name).values():
        if peft_internals.is_merged(layer, adapter_name):
            raise NotPrepared(adapter_name, "the adapter is merged, unmerge it first")
    return Adapter.from_peft_model(model, adapter_name)


def _default_envelope(
    model: torch.nn.Module, adapter: Adapter | None, adapter_name: str
) -> Envelope:
    if adapter is None:
        raise InvalidEnvelope("max_rank", "a model without an adapter needs an envelope")
    return smallest_envelope(model, adapter, adapter_name)


def smallest_envelope(
    model: torch.nn.Module, adapter: Adapter, adapter_name: str, *, max_rank: int | None = None
) -> Envelope:
    """The smallest envelope for the adapter of a PeftModel; ``max_rank`` raises its rank.

    Raises:
        NotPrepared: the adapter has no LoRA layers.
    """
    config = adapter.parsed_config
    modules = list(layers.lora_layers(model, adapter_name))
    if not modules:
        raise NotPrepared(adapter_name, "the adapter has no LoRA layers")
    return Envelope(
        max_rank=max_rank or max(map(config.rank, modules)),
        target_modules=modules,
        modules_to_save=list(layers.saved_modules(model, adapter_name)),
        use_dora=config.use_dora,
        bias=config.bias,
        lora_bias=config.lora_bias,
    )


def _refuse_shared_biases(
    model: torch.nn.Module, envelope: Envelope, adapter: Adapter | None, adapter_name: str
) -> None:
    """All adapters of a model use the base layers' own biases, so only one slot can hold them.

    Raises:
        NotPrepared: the model's adapter has overwritten the base model's biases.
        InvalidEnvelope: another slot of this model holds them.
    """
    if adapter is not None and adapter.parsed_config.bias != "none":
        rule = (
            "loading an adapter with trained biases has overwritten the base model's own, which "
            "other adapters need: prepare the base model, then commit this adapter"
        )
        raise NotPrepared(adapter_name, rule)
    if envelope.bias != "none":
        for other in slot_registry.slots(model).values():
            if other.layout.envelope.bias != "none":
                rule = f"slot {other.adapter_name!r} of this model holds the base layers' biases"
                raise InvalidEnvelope("bias", rule)


def _build(
    model: torch.nn.Module, envelope: Envelope, adapter: Adapter | None, adapter_name: str
) -> Slot:
    undo = injection.Undo(model, adapter_name)
    dtype = tensors.parameter_dtype(model, adapter_name)
    try:
        peft_model = injection.inject(model, envelope, adapter_name)
        tensors.pin_scalings(peft_model, adapter_name)
        found = list(tensors.slot_tensors(peft_model, envelope, adapter_name, dtype))
        layout = lay_out(
            (one.place for one in found),
            envelope,
            base_model=getattr(getattr(peft_model, "config", None), "name_or_path", None),
            base_weights=tensors.base_weights(peft_model, adapter_name),
        )
        image = null_image(layout) if adapter is None else pack(adapter, layout)
        slot = Slot(peft_model, layout, adapter_name, found, first=image)
    except BaseException:
        undo.restore()
        raise
    peft_model.eval()
    return slot
