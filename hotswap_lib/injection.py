"""Add LoRA layers and saved modules to a model for an envelope, and take them out again.

Layers are created on the meta device: `hotswap_lib.slot` binds the slot's memory to them.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from . import accelerate_internals, peft_internals, torch_internals
from .envelope import Envelope
from .errors import AlreadyCompiled, InvalidEnvelope, NotPrepared
from .layer_kinds import is_supported
from .layers import base_of, lora_layers, saved_modules


def refuse_compiled(model: torch.nn.Module) -> None:
    """Reject a model that is compiled, or that contains a compiled module.

    Raises:
        AlreadyCompiled: names the module.
    """
    for name, module in model.named_modules():
        if torch_internals.is_compiled(module):
            raise AlreadyCompiled(f"module {name!r}" if name else type(model).__name__)


def refuse_foreign(model: torch.nn.Module, adapter_name: str) -> None:
    """Reject an adapter name that PEFT cannot use, and a model with LoRA that PEFT does not manage.

    Raises:
        NotPrepared: the name is invalid, or the model has LoRA layers and is not a PeftModel.
    """
    try:
        torch.nn.ModuleDict({adapter_name: torch.nn.Identity()})
    except (KeyError, TypeError) as error:
        rule = f"an adapter cannot have this name: {error.args[0]}"
        raise NotPrepared(adapter_name, rule) from error
    if isinstance(model, PeftModel):
        return
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        rule = (
            "the model has LoRA layers already and is not a PeftModel: lift the adapter out "
            "(Adapter.from_peft_model), and prepare the model without it"
        )
        raise NotPrepared(adapter_name, rule)


def refuse_offloaded(name: str, module: torch.nn.Module, field: str) -> None:
    """Reject a module whose weights accelerate loads on every call: they have no fixed memory.

    Raises:
        InvalidEnvelope: the module, or one inside it, is offloaded.
    """
    if any(accelerate_internals.moves_weights(inner) for inner in module.modules()):
        raise InvalidEnvelope(field, f"module {name!r} is offloaded: its weights move")


def inject(model: torch.nn.Module, envelope: Envelope, adapter_name: str) -> PeftModel:
    """Give every target of the envelope a LoRA layer on the meta device, and every saved module a
    copy.

    Raises:
        InvalidEnvelope: the model has no such target, or one of an unsupported kind. The caller
            restores the model (`Undo`).
    """
    _refuse_unpreparable(model, envelope)
    with warnings.catch_warnings():
        # PEFT's advice about training and merging: tied weights, fan_in_fan_out, grouped Conv2d
        warnings.simplefilter("ignore")
        try:
            model = _inject(model, _config(envelope), adapter_name)
        except ValueError as error:
            raise InvalidEnvelope("target_modules", str(error)) from error
    _check_layers(model, envelope, adapter_name)
    _check_saved_modules(model, envelope, adapter_name)
    return model


def _refuse_unpreparable(model: torch.nn.Module, envelope: Envelope) -> None:
    """The checks that have to come before PEFT changes the model."""
    if accelerate_internals.moves_as_a_whole(base_of(model)):
        raise InvalidEnvelope("target_modules", "the model is offloaded: its weights move")
    for name, module in model.named_modules():
        if envelope.use_dora and type(module).__name__ == "Linear8bitLt":
            weight = cast(torch.Tensor, module.weight)
            if weight.device.type == "cpu":
                # PEFT reads the weight in a way that leaves the layer without its scales
                rule = f"{name!r} is an 8 bit layer on a CPU, where PEFT's DoRA does not work"
                raise InvalidEnvelope("use_dora", rule)


def _config(envelope: Envelope) -> LoraConfig:
    targets, saved = envelope.target_modules, envelope.modules_to_save
    return LoraConfig(
        r=envelope.max_rank,
        lora_alpha=envelope.max_rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=None if saved is None else list(saved),
        use_dora=envelope.use_dora,
        lora_bias=envelope.lora_bias,
        inference_mode=True,
    )


def _inject(model: torch.nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return get_peft_model(
            cast(Any, model), config, adapter_name=adapter_name, low_cpu_mem_usage=True
        )
    # what is left of the first adapter would mix with the envelope: other targets, DoRA, ...
    for layer in lora_layers(model, adapter_name).values():
        for _, container in list(peft_internals.containers(layer, adapter_name)):
            del container[adapter_name]
    for field in ("task_type", "base_model_name_or_path", "revision", "auto_mapping"):
        setattr(config, field, getattr(model.peft_config[adapter_name], field))
    peft_internals.inject_again(model, config, adapter_name)
    return model


def _check_layers(model: PeftModel, envelope: Envelope, adapter_name: str) -> None:
    injected = lora_layers(model, adapter_name)
    for name, layer in injected.items():
        if not is_supported(layer):
            what = f"{type(layer).__name__} over {type(layer.get_base_layer()).__name__}"
            rule = f"target {name!r} ({what}) is not supported"
            raise InvalidEnvelope("target_modules", rule)
        if envelope.use_dora and getattr(layer.get_base_layer(), "groups", 1) > 1:
            # PEFT computes its weight norm from a view that a padded rank changes
            rule = f"target {name!r} is a grouped convolution, where padded DoRA is not exact"
            raise InvalidEnvelope("use_dora", rule)
        refuse_offloaded(name, layer.get_base_layer(), "target_modules")
    if not isinstance(envelope.target_modules, str):
        for target in envelope.target_modules:  # PEFT requires only one of them
            if not any(f".{name}".endswith(f".{target}") for name in injected):
                raise InvalidEnvelope("target_modules", f"the model has no module {target!r}")


def _check_saved_modules(model: PeftModel, envelope: Envelope, adapter_name: str) -> None:
    saved = saved_modules(model, adapter_name)
    # one is enough, as in PEFT, which adds "classifier" and "score" for every classifier
    if envelope.modules_to_save and not saved:
        rule = f"the model has none of the modules {list(envelope.modules_to_save)}"
        raise InvalidEnvelope("modules_to_save", rule)
    for name, wrapper in saved.items():
        refuse_offloaded(name, peft_internals.original_of(wrapper), "modules_to_save")
        if any(isinstance(module, LoraLayer) for module in wrapper.modules()):
            raise InvalidEnvelope("modules_to_save", f"there are LoRA targets inside {name!r}")


class Undo:
    """The state of a model's LoRA layers before an injection, and how to restore it."""

    def __init__(self, model: torch.nn.Module, adapter_name: str) -> None:
        self._model = model
        self._base = base_of(model)
        self._adapter_name = adapter_name
        self._config = getattr(model, "peft_config", {}).get(adapter_name)
        self._trained = [(p, p.requires_grad) for p in self._base.parameters()]
        self._held = {
            layer: {
                attribute: container[adapter_name]
                for attribute, container in peft_internals.containers(layer, adapter_name)
            }
            for layer in self._base.modules()
            if isinstance(layer, LoraLayer)
        }
        self._saved = {
            module: peft_internals.has_copy(module, adapter_name)
            for module in self._base.modules()
            if isinstance(module, ModulesToSaveWrapper)
        }

    def restore(self) -> None:
        """Bring every layer, saved module and ``requires_grad`` back to that state."""
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        # from the inside out: a module inside a wrapper has to be restored before the wrapper goes
        for name, module in reversed(list(self._base.named_modules())):
            if isinstance(module, LoraLayer):
                self._restore_layer(name, module)
            elif isinstance(module, ModulesToSaveWrapper):
                self._restore_saved(name, module)
        peft_internals.restore_config(self._model, self._adapter_name, self._config)

    def _restore_layer(self, name: str, layer: LoraLayer) -> None:
        if layer not in self._held:
            self._replace(name, layer.get_base_layer())
            return
        held = self._held[layer]
        for attribute, container in list(peft_internals.containers(layer, self._adapter_name)):
            if attribute not in held:
                del container[self._adapter_name]
        for attribute, value in held.items():
            getattr(layer, attribute)[self._adapter_name] = value

    def _restore_saved(self, name: str, wrapper: ModulesToSaveWrapper) -> None:
        if wrapper not in self._saved:
            self._replace(name, peft_internals.original_of(wrapper))
        elif not self._saved[wrapper] and peft_internals.has_copy(wrapper, self._adapter_name):
            peft_internals.delete_copy(wrapper, self._adapter_name)

    def _replace(self, name: str, module: torch.nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._base.get_submodule(parent), child, module)
