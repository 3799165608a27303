"""An adapter's configuration, parsed and checked: ranks, scalings, features, targets.

Checks everything that can be wrong with a configuration alone. `hotswap_lib.fit` checks whether an
adapter fits a layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from . import peft_internals
from .errors import AdapterConfigInvalid, AdapterRefused, FeatureOutsideEnvelope

# Features that no envelope supports.
_UNSUPPORTED = {
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters",
}
# Fields of other methods that are saved with peft_type LORA.
_OTHER_METHODS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initialisations that leave the base weights alone when PEFT loads the adapter.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The configuration fields that matter to a slot, with defaults filled in.

    The fields have LoraConfig's names and meanings.

    Attributes:
        targets: the fields that choose modules; None where only a model could tell what they
            match (``"all-linear"``, or ``ensure_weight_tying``, which adds tied modules).
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]
    targets: LoraConfig | None

    @classmethod
    def parse(cls, adapter: str, config: Mapping[str, Any]) -> AdapterConfig:
        """Parse the content of an ``adapter_config.json``; ``adapter`` is its name in errors.

        Raises:
            AdapterConfigInvalid: it is not LoRA, or a field has an invalid type or value.
        """
        if str(config.get("peft_type")).upper() != "LORA":
            rule = f"peft_type is {config.get('peft_type')!r}, and only LORA is supported"
            raise AdapterConfigInvalid(adapter, None, rule)
        ranks = _pattern(adapter, config, "rank_pattern")
        alphas = _pattern(adapter, config, "alpha_pattern")
        _check_ranks(adapter, {"r": config.get("r", 8), **ranks})
        _check_alphas(adapter, {"lora_alpha": config.get("lora_alpha", 8), **alphas})
        return cls(
            r=config.get("r", 8),
            lora_alpha=config.get("lora_alpha", 8),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=bool(config.get("use_rslora", False)),
            use_dora=bool(config.get("use_dora", False)),
            lora_bias=bool(config.get("lora_bias", False)),
            bias=_bias(adapter, config),
            modules_to_save=_modules_to_save(adapter, config),
            targets=_targets(adapter, config),
        )

    def rank(self, module: str) -> int:
        """The rank that PEFT gives a module."""
        return peft_internals.in_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (peft.tuners.lora.layer.update_layer)."""
        alpha = peft_internals.in_pattern(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def has_lora_on(self, module: str) -> bool:
        """True if PEFT would put LoRA on a module; True also where only a model could tell."""
        return self.targets is None or peft_internals.is_target(self.targets, module)

    def saves(self, module: str) -> bool:
        """True if a module is in modules_to_save, matched by suffix as in PEFT."""
        return any(module.endswith(suffix) for suffix in self.modules_to_save)


def _check_ranks(adapter: str, ranks: Mapping[str, Any]) -> None:
    for where, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            rule = f"rank {where!r} in the configuration is {rank!r} and not a positive number"
            raise AdapterConfigInvalid(adapter, None, rule)


def _check_alphas(adapter: str, alphas: Mapping[str, Any]) -> None:
    for where, alpha in alphas.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not math.isfinite(alpha):
            rule = f"alpha {where!r} in the configuration is {alpha!r} and not a finite number"
            raise AdapterConfigInvalid(adapter, None, rule)


def _targets(adapter: str, config: Mapping[str, Any]) -> LoraConfig | None:
    if config.get("target_modules") in (None, "all-linear") or config.get("ensure_weight_tying"):
        return None
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    try:
        return LoraConfig(**{field: config.get(field) for field in fields})
    except (TypeError, ValueError) as error:
        rule = f"its target modules are invalid: {error}"
        raise AdapterConfigInvalid(adapter, None, rule) from error


def _bias(adapter: str, config: Mapping[str, Any]) -> str:
    bias = config.get("bias") or "none"
    if bias not in ("none", "lora_only", "all"):
        rule = f"bias is {bias!r} and not 'none', 'lora_only' or 'all'"
        raise AdapterConfigInvalid(adapter, None, rule)
    return str(bias)


def _modules_to_save(adapter: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    saved = config.get("modules_to_save") or ()
    if isinstance(saved, str) or not all(isinstance(name, str) for name in saved):
        rule = f"modules_to_save is {saved!r} and not a list of names"
        raise AdapterConfigInvalid(adapter, None, rule)
    return tuple(saved)


def _pattern(adapter: str, config: Mapping[str, Any], field: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, Mapping):
        raise AdapterConfigInvalid(adapter, None, f"{field} is not a mapping")
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            rule = f"{field} has the key {key!r}, which is not a regular expression"
            raise AdapterConfigInvalid(adapter, None, rule) from error
    return dict(pattern)


def refuse_unsupported(adapter: str, config: Mapping[str, Any]) -> None:
    """Reject by name what no envelope supports; ``adapter`` is the adapter's name in errors.

    Raises:
        AdapterRefused: it uses another method that is saved with peft_type LORA, or an
            initialisation that rewrites the base model.
        FeatureOutsideEnvelope: it has trained tokens, or LoRA on bare parameters.
    """
    for field, words in _UNSUPPORTED.items():
        if config.get(field) not in (None, [], {}):
            rule = f"it uses {words} ({field}), which no envelope supports"
            raise FeatureOutsideEnvelope(adapter, None, rule)
    for field in _OTHER_METHODS:
        if config.get(field):
            raise AdapterRefused(adapter, None, f"it uses {field}, which is not supported")
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        rule = f"init_lora_weights={init!r} may change more than LoRA when the adapter is loaded"
        raise AdapterRefused(adapter, None, rule)
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        rule = "it saves modules with ensure_weight_tying, which is not supported"
        raise AdapterRefused(adapter, None, rule)
