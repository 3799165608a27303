"""What an adapter's configuration says, checked: ranks, scalings, features, targets.

Everything that can be wrong with a configuration by itself, or that no slot could ever hold, is
said here; whether an adapter fits a certain layout is for `hotswap_lib.fit` to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from .errors import AdapterConfigInvalid, AdapterRefused, FeatureOutsideEnvelope
from .source import Adapter

# Fields that no envelope can hold.
_NO_PLACE = {
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters",
}
# Fields of other methods that travel under the name of LoRA.
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
# Others rewrite the base weights when PEFT loads the adapter, or are not known here.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The configuration fields that matter to a slot, checked and with defaults filled in."""

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

    def rank(self, module: str) -> int:
        """The rank for a module, by the rule that PEFT creates its layers with."""
        if not self.rank_pattern:
            return self.r
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (peft.tuners.lora.layer.update_layer)."""
        alpha = self.lora_alpha
        if self.alpha_pattern:
            alpha_key = get_pattern_key(list(self.alpha_pattern), module)
            alpha = self.alpha_pattern.get(alpha_key, alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def has_lora_on(self, module: str) -> bool:
        """Whether PEFT would put LoRA on a module, by its own rule."""
        return self.targets is None or bool(check_target_module_exists(self.targets, module))

    def saves(self, module: str) -> bool:
        """Whether a module is one of modules_to_save (by suffix, as PEFT matches them)."""
        return any(module.endswith(suffix) for suffix in self.modules_to_save)


def read_settings(adapter: Adapter) -> Settings:
    """The fields of an adapter's configuration that matter to a slot.

    Raises:
        AdapterConfigInvalid: not LoRA, or a field of a senseless type or value.
    """
    config = adapter.config
    if str(config.get("peft_type")).upper() != "LORA":
        rule = f"peft_type is {config.get('peft_type')!r}, and only LORA is supported"
        raise AdapterConfigInvalid(adapter.name, None, rule)
    ranks = _pattern(adapter, "rank_pattern")
    alphas = _pattern(adapter, "alpha_pattern")
    for where, rank in {"r": config.get("r", 8), **ranks}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            rule = f"rank {where!r} in the configuration is {rank!r} and not a positive number"
            raise AdapterConfigInvalid(adapter.name, None, rule)
    for where, alpha in {"lora_alpha": config.get("lora_alpha", 8), **alphas}.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not math.isfinite(alpha):
            rule = f"alpha {where!r} in the configuration is {alpha!r} and not a finite number"
            raise AdapterConfigInvalid(adapter.name, None, rule)
    return Settings(
        r=config.get("r", 8),
        lora_alpha=config.get("lora_alpha", 8),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
        lora_bias=bool(config.get("lora_bias", False)),
        bias=_bias(adapter),
        modules_to_save=_modules_to_save(adapter),
        targets=_targets(adapter),
    )


def _targets(adapter: Adapter) -> LoraConfig | None:
    """The fields that choose modules; None where only a model could say what they mean."""
    config = adapter.config
    # with ensure_weight_tying PEFT adds what is tied to a target
    if config.get("target_modules") in (None, "all-linear") or config.get("ensure_weight_tying"):
        return None
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    try:
        return LoraConfig(**{field: config.get(field) for field in fields})
    except (TypeError, ValueError) as error:
        rule = f"its target modules make no sense: {error}"
        raise AdapterConfigInvalid(adapter.name, None, rule) from error


def _bias(adapter: Adapter) -> str:
    bias = adapter.config.get("bias") or "none"
    if bias not in ("none", "lora_only", "all"):
        rule = f"bias is {bias!r}, and only 'none', 'lora_only' and 'all' mean something"
        raise AdapterConfigInvalid(adapter.name, None, rule)
    return str(bias)


def _modules_to_save(adapter: Adapter) -> tuple[str, ...]:
    saved = adapter.config.get("modules_to_save") or ()
    if isinstance(saved, str) or not all(isinstance(name, str) for name in saved):
        rule = f"modules_to_save is {saved!r} and not a list of names"
        raise AdapterConfigInvalid(adapter.name, None, rule)
    return tuple(saved)


def _pattern(adapter: Adapter, field: str) -> dict[str, Any]:
    pattern = adapter.config.get(field) or {}
    if not isinstance(pattern, Mapping):
        raise AdapterConfigInvalid(adapter.name, None, f"{field} is not a mapping")
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            rule = f"{field} has the key {key!r}, which is no regular expression"
            raise AdapterConfigInvalid(adapter.name, None, rule) from error
    return dict(pattern)


def refuse_unsupported(adapter: Adapter) -> None:
    """Say by name what no envelope has a place for.

    Raises:
        AdapterRefused: another method under LoRA's name, or an initialisation that rewrites the
            base model.
        FeatureOutsideEnvelope: trained tokens, or LoRA on bare parameters.
    """
    config = adapter.config
    for field, words in _NO_PLACE.items():
        if config.get(field) not in (None, [], {}):
            rule = f"it uses {words} ({field}), for which no envelope has a place"
            raise FeatureOutsideEnvelope(adapter.name, None, rule)
    for field in _OTHER_METHODS:
        if config.get(field):
            raise AdapterRefused(adapter.name, None, f"it uses {field}, which is not supported")
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        rule = f"init_lora_weights={init!r} may change more than LoRA when the adapter is loaded"
        raise AdapterRefused(adapter.name, None, rule)
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        rule = "it saves modules with ensure_weight_tying, which is not supported"
        raise AdapterRefused(adapter.name, None, rule)
