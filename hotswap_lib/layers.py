"""The LoRA layers inside a model: add them, find them, put their tensors somewhere else.

The only file that knows how PEFT arranges its modules. `ROLES` says, for each LoRA layer class
over each base layer class, which parameters it has and which of their dimensions is the rank;
supporting another kind of layer means another row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer

from .envelope import Envelope
from .errors import AlreadyCompiled, InvalidEnvelope
from .layout import SCALING, Layout, Place

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Role:
    """One parameter of a LoRA layer: ``layer.<container>[adapter_name].<attribute>``."""

    container: str
    attribute: str
    rank_dim: int | None

    @property
    def suffix(self) -> str:
        return f"{self.container}.{self.attribute}"


ROLES: Mapping[tuple[type, type], tuple[Role, ...]] = {
    (LoraLinear, torch.nn.Linear): (
        Role("lora_A", "weight", rank_dim=0),  # (rank, in_features)
        Role("lora_B", "weight", rank_dim=1),  # (out_features, rank)
    ),
}


def refuse_compiled(model: torch.nn.Module) -> None:
    """Notice ``torch.compile(model)`` and ``module.compile()``, on the model or inside it.

    Raises:
        AlreadyCompiled: names the module.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise AlreadyCompiled(f"module {name!r}" if name else type(model).__name__)


def lora_layers(model: torch.nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Module name as PEFT's patterns see it → layer, for the layers that hold this adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling
    }


def inject(model: torch.nn.Module, envelope: Envelope, adapter_name: str) -> PeftModel:
    """Give every target of the envelope a LoRA layer whose weights are still on the meta device.

    Raises:
        InvalidEnvelope: no such target, or one that is no plain linear layer. The caller restores
            the model (`Undo`).
    """
    config = LoraConfig(
        r=envelope.max_rank,
        lora_alpha=envelope.max_rank,
        target_modules=_lora_targets(envelope),
        inference_mode=True,
    )
    try:
        if isinstance(model, PeftModel):
            _detach(model, adapter_name)
            # the model's own tuner, so that the PeftModel object and its other adapters stay
            config.task_type = model.peft_config[adapter_name].task_type
            model.peft_config[adapter_name] = config
            tuner = cast(Any, model.base_model)
            tuner.inject_adapter(tuner.model, adapter_name, low_cpu_mem_usage=True)
            # layers that are new have only this adapter active, whatever the model has
            tuner.set_adapter(tuner.active_adapters, inference_mode=True)
        else:
            model = get_peft_model(
                cast(Any, model), config, adapter_name=adapter_name, low_cpu_mem_usage=True
            )
    except ValueError as error:
        raise InvalidEnvelope("target_modules", str(error)) from error
    for name, layer in lora_layers(model, adapter_name).items():
        if adapter_name in layer.lora_variant or _key(layer) not in ROLES:
            kind = f"{type(layer).__name__} over {type(layer.get_base_layer()).__name__}"
            rule = f"target {name!r} ({kind}) is not supported, only plain Linear layers are"
            raise InvalidEnvelope("target_modules", rule)
    return model


def _detach(model: PeftModel, adapter_name: str) -> None:
    # what is left of the first adapter would mix with the envelope: other targets, DoRA, ...
    for layer in lora_layers(model, adapter_name).values():
        for _, container in list(_containers(layer, adapter_name)):
            del container[adapter_name]


def _lora_targets(envelope: Envelope) -> str | list[str]:
    targets = envelope.target_modules
    return targets if isinstance(targets, str) else list(targets)


def _key(layer: LoraLayer) -> tuple[type, type]:
    return type(layer), type(layer.get_base_layer())


def places(
    model: PeftModel, envelope: Envelope, adapter_name: str, dtype: str | None
) -> Iterator[Place]:
    """What the layout has to hold: every parameter of every LoRA layer, then every scaling.

    ``dtype`` is the dtype of the adapter that the model came with, if it came with one.
    """
    layers = lora_layers(model, adapter_name)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        for role in ROLES[_key(layer)]:
            parameter = getattr(getattr(layer, role.container)[adapter_name], role.attribute)
            yield Place(
                key=f"{PREFIX}{name}.{role.suffix}",
                module=name,
                role=role.suffix,
                shape=tuple(parameter.shape),
                rank_dim=role.rank_dim,
                dtype=envelope.dtype or dtype or _default_dtype(cast(torch.dtype, weight.dtype)),
                device=str(weight.device),
            )
    for name, layer in layers.items():
        yield Place(
            key=f"{PREFIX}{name}.{SCALING}",
            module=name,
            role=SCALING,
            shape=(),
            rank_dim=None,
            dtype="float32",
            device=str(layer.get_base_layer().weight.device),
        )


def _default_dtype(base: torch.dtype) -> str:
    # PEFT's autocast_adapter_dtype: 16 bit base models get float32 LoRA weights
    return "float64" if base is torch.float64 else "float32"


def parameter_dtype(model: torch.nn.Module, adapter_name: str) -> str | None:
    """The dtype of the adapter's weights, None where the model has no such adapter."""
    for layer in lora_layers(model, adapter_name).values():
        for parameter in layer.lora_A[adapter_name].parameters() if layer.lora_A else ():
            return str(parameter.dtype).removeprefix("torch.")
    return None


def bind(
    model: PeftModel, layout: Layout, adapter_name: str, arenas: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Put the arenas' views in place of the layers' parameters and scalings; key → tensor."""
    layers = lora_layers(model, adapter_name)
    bound = {}
    for entry in layout.entries:
        layer, view = layers[entry.module], entry.view(arenas[entry.block])
        if entry.is_scaling:
            layer.scaling[adapter_name] = view
        else:
            container, attribute = entry.role.split(".")
            view = torch.nn.Parameter(view, requires_grad=False)
            setattr(getattr(layer, container)[adapter_name], attribute, view)
        bound[entry.key] = view
    return bound


def bound_tensors(
    model: PeftModel, layout: Layout, adapter_name: str
) -> Iterator[tuple[str, object]]:
    """Key → what the model holds there now, for comparison with what `bind` returned."""
    layers = lora_layers(model, adapter_name)
    for entry in layout.entries:
        layer = layers.get(entry.module)
        if layer is None:
            yield entry.key, None
        elif entry.is_scaling:
            yield entry.key, layer.scaling.get(adapter_name)
        else:
            container, attribute = entry.role.split(".")
            yield entry.key, getattr(getattr(layer, container)[adapter_name], attribute, None)


class Undo:
    """Remembers how a model's LoRA layers are, to bring them back if preparing is refused."""

    def __init__(self, model: torch.nn.Module, adapter_name: str) -> None:
        self._model = model
        self._base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._adapter_name = adapter_name
        self._config = getattr(model, "peft_config", {}).get(adapter_name)
        self._held = {
            layer: {c: vars_of[adapter_name] for c, vars_of in _containers(layer, adapter_name)}
            for layer in self._base.modules()
            if isinstance(layer, LoraLayer)
        }

    def restore(self) -> None:
        for name, layer in list(self._base.named_modules()):
            if not isinstance(layer, LoraLayer):
                continue
            if layer not in self._held:
                parent, _, child = name.rpartition(".")
                setattr(self._base.get_submodule(parent), child, layer.get_base_layer())
                continue
            held = self._held[layer]
            for attribute, container in list(_containers(layer, self._adapter_name)):
                if attribute not in held:
                    del container[self._adapter_name]
            for attribute, value in held.items():
                getattr(layer, attribute)[self._adapter_name] = value
        if isinstance(self._model, PeftModel):
            self._model.peft_config[self._adapter_name] = cast(Any, self._config)
        elif hasattr(self._base, "peft_config"):
            del self._base.peft_config


def _containers(layer: LoraLayer, adapter_name: str) -> Iterator[tuple[str, Any]]:
    # some layers name a container twice
    names = (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
    for attribute in dict.fromkeys(names):
        container = getattr(layer, attribute, None)
        if container is not None and hasattr(container, "keys") and adapter_name in container:
            yield attribute, container
