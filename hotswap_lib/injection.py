"""The LoRA layers and saved modules inside a model: find them, add them, take them away again.

This file and `hotswap_lib.sites` are the ones that know how PEFT arranges its modules;
`hotswap_lib.roles` says which of them a slot can hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.hooks import CpuOffload, SequentialHook
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from .envelope import Envelope
from .errors import AlreadyCompiled, InvalidEnvelope, NotPrepared
from .layer_kinds import KINDS, kind


def refuse_compiled(model: torch.nn.Module) -> None:
    """Notice ``torch.compile(model)`` and ``module.compile()``, on the model or inside it.

    Raises:
        AlreadyCompiled: names the module.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise AlreadyCompiled(f"module {name!r}" if name else type(model).__name__)


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a PeftModel, whose module names are those in PEFT's patterns."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lora_layers(model: torch.nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Module name as PEFT's patterns see it → layer, for the layers that hold this adapter."""
    return {
        name: layer
        for name, layer in base_of(model).named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling
    }


def saved_modules(model: torch.nn.Module, adapter_name: str) -> dict[str, ModulesToSaveWrapper]:
    """Module name → wrapper, for the modules of which this adapter has a copy of its own."""
    return {
        name: module
        for name, module in base_of(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }


def inject(model: torch.nn.Module, envelope: Envelope, adapter_name: str) -> PeftModel:
    """Give every target of the envelope a LoRA layer whose weights are still on the meta device,
    and every saved module a copy.

    Raises:
        InvalidEnvelope: no such target, or one that is of no known kind. The caller restores
            the model (`Undo`).
    """
    _refuse_unpreparable(model, envelope)
    with warnings.catch_warnings():
        # PEFT's advice about training and merging: tied weights, fan_in_fan_out, grouped Conv2d
        warnings.simplefilter("ignore")
        try:
            model = _inject(model, _config(envelope), adapter_name)
        except ValueError as error:
            raise InvalidEnvelope("target_modules", str(error)) from error
    _check_injected(model, envelope, adapter_name)
    return model


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
    _detach(model, adapter_name)
    # the model's own tuner, so that the PeftModel object and its other adapters stay
    for field in ("task_type", "base_model_name_or_path", "revision", "auto_mapping"):
        setattr(config, field, getattr(model.peft_config[adapter_name], field))
    model.peft_config[adapter_name] = config
    tuner = cast(Any, model.base_model)
    active = list(tuner.active_adapters)
    tuner.inject_adapter(tuner.model, adapter_name, low_cpu_mem_usage=True)
    # layers that are new have only this adapter active, whatever the model has
    tuner.set_adapter(active, inference_mode=True)
    return model


def _check_injected(model: PeftModel, envelope: Envelope, adapter_name: str) -> None:
    injected = lora_layers(model, adapter_name)
    for name, layer in injected.items():
        if kind(layer) not in KINDS:
            what = f"{type(layer).__name__} over {type(layer.get_base_layer()).__name__}"
            rule = f"target {name!r} ({what}) is not supported"
            raise InvalidEnvelope("target_modules", rule)
        if envelope.use_dora and getattr(layer.get_base_layer(), "groups", 1) > 1:
            # PEFT computes its weight norm from a view that a padded rank changes
            rule = f"target {name!r} is a grouped convolution, where padded DoRA is not exact"
            raise InvalidEnvelope("use_dora", rule)
        refuse_offloaded(name, layer.get_base_layer(), "target_modules")
    if not isinstance(envelope.target_modules, str):
        for target in envelope.target_modules:  # PEFT is content if it finds one of them
            if not any(f".{name}".endswith(f".{target}") for name in injected):
                raise InvalidEnvelope("target_modules", f"the model has no module {target!r}")
    saved = saved_modules(model, adapter_name)
    # one is enough, as for PEFT, which itself asks for "classifier" and "score" of every classifier
    if envelope.modules_to_save and not saved:
        rule = f"the model has none of the modules {list(envelope.modules_to_save)}"
        raise InvalidEnvelope("modules_to_save", rule)
    for name, wrapper in saved.items():
        refuse_offloaded(name, wrapper.original_module, "modules_to_save")
        if any(isinstance(module, LoraLayer) for module in wrapper.modules()):
            raise InvalidEnvelope("modules_to_save", f"there are LoRA targets inside {name!r}")


def refuse_offloaded(name: str, module: torch.nn.Module, field: str) -> None:
    """A module whose weights accelerate brings on every call has no memory to keep a slot in.

    Raises:
        InvalidEnvelope: the module, or one inside it, is offloaded.
    """
    for inner in module.modules():
        hook = getattr(inner, "_hf_hook", None)
        hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
        if any(isinstance(one, CpuOffload) or getattr(one, "offload", False) for one in hooks):
            raise InvalidEnvelope(field, f"module {name!r} is offloaded: its weights move")


def refuse_foreign(model: torch.nn.Module, adapter_name: str) -> None:
    """What cannot be given a slot under this name.

    Raises:
        NotPrepared: the name cannot be an adapter's, or the model has LoRA layers that were put
            there by others than PEFT's PeftModel.
    """
    try:
        torch.nn.ModuleDict({adapter_name: torch.nn.Identity()})
    except (KeyError, TypeError) as error:
        rule = f"an adapter cannot have this name: {error.args[0]}"
        raise NotPrepared(adapter_name, rule) from error
    if not isinstance(model, PeftModel):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                rule = (
                    "the model has LoRA layers already and is no PeftModel: lift the adapter out "
                    "(Adapter.from_peft_model), and prepare the model without it"
                )
                raise NotPrepared(adapter_name, rule)


def _refuse_unpreparable(model: torch.nn.Module, envelope: Envelope) -> None:
    """What has to be known before PEFT changes the model."""
    hook = getattr(base_of(model), "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        raise InvalidEnvelope("target_modules", "the model is offloaded: its weights move")
    for name, module in model.named_modules():
        if envelope.use_dora and type(module).__name__ == "Linear8bitLt":
            weight = cast(torch.Tensor, module.weight)
            if weight.device.type == "cpu":
                # PEFT reads the weight in a way that leaves the layer without its scales
                rule = f"{name!r} is an 8 bit layer on a CPU, where PEFT's DoRA does not work"
                raise InvalidEnvelope("use_dora", rule)


def _detach(model: PeftModel, adapter_name: str) -> None:
    # what is left of the first adapter would mix with the envelope: other targets, DoRA, ...
    for layer in lora_layers(model, adapter_name).values():
        for _, container in list(_containers(layer, adapter_name)):
            del container[adapter_name]


class Undo:
    """Remembers how a model's LoRA layers are, to bring them back if preparing is refused."""

    def __init__(self, model: torch.nn.Module, adapter_name: str) -> None:
        self._model = model
        self._base = base_of(model)
        self._adapter_name = adapter_name
        self._config = getattr(model, "peft_config", {}).get(adapter_name)
        self._trained = [(p, p.requires_grad) for p in self._base.parameters()]
        self._held = {
            layer: {c: vars_of[adapter_name] for c, vars_of in _containers(layer, adapter_name)}
            for layer in self._base.modules()
            if isinstance(layer, LoraLayer)
        }
        self._saved = {
            module: adapter_name in module.modules_to_save
            for module in self._base.modules()
            if isinstance(module, ModulesToSaveWrapper)
        }

    def restore(self) -> None:
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        # from the inside out: what is inside a wrapper that goes away has to be restored before
        for name, module in reversed(list(self._base.named_modules())):
            if isinstance(module, LoraLayer):
                self._restore_layer(name, module)
            elif isinstance(module, ModulesToSaveWrapper):
                self._restore_saved(name, module)
        if isinstance(self._model, PeftModel):
            self._model.peft_config[self._adapter_name] = cast(Any, self._config)
        elif hasattr(self._base, "peft_config"):
            del self._base.peft_config

    def _restore_layer(self, name: str, layer: LoraLayer) -> None:
        if layer not in self._held:
            self._replace(name, layer.get_base_layer())
            return
        held = self._held[layer]
        for attribute, container in list(_containers(layer, self._adapter_name)):
            if attribute not in held:
                del container[self._adapter_name]
        for attribute, value in held.items():
            getattr(layer, attribute)[self._adapter_name] = value

    def _restore_saved(self, name: str, wrapper: ModulesToSaveWrapper) -> None:
        if wrapper not in self._saved:
            self._replace(name, wrapper.original_module)
        elif not self._saved[wrapper] and self._adapter_name in wrapper.modules_to_save:
            wrapper.delete_adapter(self._adapter_name, list(wrapper.active_adapters))

    def _replace(self, name: str, module: torch.nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._base.get_submodule(parent), child, module)


def _containers(layer: LoraLayer, adapter_name: str) -> Iterator[tuple[str, Any]]:
    # some layers name a container twice
    names = (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
    for attribute in dict.fromkeys(names):
        container = getattr(layer, attribute, None)
        if container is not None and hasattr(container, "keys") and adapter_name in container:
            yield attribute, container
