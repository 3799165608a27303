"""Preparing: from a model to its slot. Before every other stage, and before compile.

Whatever is refused here leaves the model as it was found.
"""

from __future__ import annotations

import torch
import torch._inductor.config
from peft import PeftModel

from . import injection as layers
from . import slot_registry as attachment
from . import slot_tensors as sites
from .adapter_config import read_settings
from .envelope import Envelope
from .errors import InvalidEnvelope, NotPrepared
from .image import null_image, pack
from .layout import lay_out
from .slot import Slot
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
        model: a model without adapters, which goes on behaving as it did until the first commit,
            or a PeftModel, whose adapter becomes the first live revision.
        envelope: what adapters may be; the smallest one for the PeftModel's adapter if left out.
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
        AdapterRefused: the PeftModel's adapter is not inside the envelope; the model is unchanged.
    """
    slot = attachment.find_slot(model, adapter_name)
    if slot is not None and envelope in (None, slot.envelope):
        return slot
    if slot is not None:
        raise InvalidEnvelope("max_rank", "the model was prepared with another envelope")
    if not allow_compiled:
        layers.refuse_compiled(model)
    if torch._inductor.config.freezing:
        rule = "inductor's freezing is on, which copies weights into compiled code for good"
        raise NotPrepared(adapter_name, rule)
    layers.refuse_foreign(model, adapter_name)
    adapter = _first_adapter(model, adapter_name) if isinstance(model, PeftModel) else None
    if envelope is None and adapter is None:
        raise InvalidEnvelope("max_rank", "a model without an adapter needs an envelope")
    if envelope is None:
        assert adapter is not None
        envelope = smallest_envelope(model, adapter, adapter_name)
    _refuse_shared_biases(model, envelope, adapter, adapter_name)
    slot = _build(model, envelope, adapter, adapter_name)
    attachment.attach(slot)
    return slot


def _first_adapter(model: PeftModel, adapter_name: str) -> Adapter:
    if adapter_name not in model.peft_config:
        raise NotPrepared(adapter_name, f"the model has adapters {sorted(model.peft_config)}")
    for layer in layers.lora_layers(model, adapter_name).values():
        if adapter_name in layer.merged_adapters:
            raise NotPrepared(adapter_name, "the adapter is merged, unmerge it first")
    return Adapter.from_peft_model(model, adapter_name)


def smallest_envelope(
    model: torch.nn.Module, adapter: Adapter, adapter_name: str, *, max_rank: int | None = None
) -> Envelope:
    """What the adapter of a PeftModel needs, or more in the rank alone.

    Raises:
        NotPrepared: the adapter has no LoRA layers.
    """
    settings = read_settings(adapter)
    modules = list(layers.lora_layers(model, adapter_name))
    if not modules:
        raise NotPrepared(adapter_name, "the adapter has no LoRA layers")
    return Envelope(
        max_rank=max_rank or max(map(settings.rank, modules)),
        target_modules=modules,
        modules_to_save=list(layers.saved_modules(model, adapter_name)),
        use_dora=settings.use_dora,
        bias=settings.bias,
        lora_bias=settings.lora_bias,
    )


def _refuse_shared_biases(
    model: torch.nn.Module, envelope: Envelope, adapter: Adapter | None, adapter_name: str
) -> None:
    """All adapters of a model share the base layers' own biases: there is one place for them.

    Raises:
        NotPrepared: the model's adapter has put its biases over the base model's.
        InvalidEnvelope: another slot of this model holds them.
    """
    if adapter is not None and read_settings(adapter).bias != "none":
        rule = (
            "loading an adapter with trained biases has overwritten the base model's own, which "
            "other adapters need: prepare the base model, then commit this adapter"
        )
        raise NotPrepared(adapter_name, rule)
    if envelope.bias != "none":
        for other in attachment.slots(model):
            if other.envelope.bias != "none":
                rule = f"slot {other.adapter_name!r} of this model holds the base layers' biases"
                raise InvalidEnvelope("bias", rule)


def _build(
    model: torch.nn.Module, envelope: Envelope, adapter: Adapter | None, adapter_name: str
) -> Slot:
    undo = layers.Undo(model, adapter_name)
    dtype = sites.parameter_dtype(model, adapter_name)
    try:
        peft_model = layers.inject(model, envelope, adapter_name)
        sites.pin_scalings(peft_model, adapter_name)
        found = list(sites.sites(peft_model, envelope, adapter_name, dtype))
        layout = lay_out(
            (site.place for site in found),
            envelope,
            base_model=getattr(getattr(peft_model, "config", None), "_name_or_path", None),
            base_weights=sites.base_weights(peft_model, adapter_name),
        )
        image = null_image(layout) if adapter is None else pack(adapter, layout)
        slot = Slot(peft_model, layout, adapter_name, found, first=image)
    except BaseException:
        undo.restore()
        raise
    peft_model.eval()
    return slot
