"""Does an adapter fit a layout? Every rule about adapters is here, and pack asks them all.

Looks only at the configuration and at keys, shapes and dtypes; whether the values are finite is
checked by `hotswap_lib.image` on the packed bytes, after the cast into the slot's dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from .errors import (
    AdapterConfigInvalid,
    AdapterRefused,
    FeatureOutsideEnvelope,
    MissingTensor,
    RankMismatch,
    RankOverEnvelope,
    ShapeMismatch,
    TargetOutsideEnvelope,
)
from .layout import Entry, Layout
from .source import Adapter

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PAIR = re.compile(r"(?P<module>.+)\.lora_(embedding_)?[AB](\.weight)?")

# Fields that change the computation in ways that an envelope can or will be able to hold.
_ENVELOPE_FEATURES = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "bias": "trained biases",
    "modules_to_save": "saved modules",
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
# Every other initialisation rewrites the base weights when PEFT loads the adapter.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The configuration fields that scale a LoRA adapter, checked and with defaults filled in."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank(self, module: str) -> int:
        """The rank for a module, by the rule that PEFT creates its layers with."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (peft.tuners.lora.layer.update_layer)."""
        alpha_key = get_pattern_key(list(self.alpha_pattern), module)
        alpha = self.alpha_pattern.get(alpha_key, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """An adapter that fits: what to write where.

    Attributes:
        writes: each tensor with its entry.
        scalings: module → scaling; modules that the adapter leaves alone are absent.
        ranks: module → the adapter's own rank, unpadded.
    """

    writes: tuple[tuple[Entry, torch.Tensor], ...]
    scalings: Mapping[str, float]
    ranks: Mapping[str, int]


def fit(adapter: Adapter, layout: Layout) -> Fit:
    """Match an adapter with a layout.

    Raises:
        AdapterRefused: the subclass for the rule that it breaks.
    """
    settings = read_settings(adapter)
    _refuse_features(adapter)
    entries = {entry.key: entry for entry in layout.entries if not entry.is_scaling}
    for key in sorted(adapter.tensors):
        if key not in entries:
            raise _unplaced(adapter, key, layout)
    if not adapter.tensors:
        raise MissingTensor(adapter.name, None, "there is no LoRA tensor in it")
    modules = {entries[key].module for key in adapter.tensors}
    writes = []
    for entry in entries.values():
        if entry.module not in modules:
            continue
        tensor = adapter.tensors.get(entry.key)
        if tensor is None:
            raise MissingTensor(adapter.name, entry.key, "its LoRA pair is there and it is not")
        _check_tensor(adapter, entry, tensor, layout, settings.rank(entry.module))
        writes.append((entry, tensor))
    return Fit(
        writes=tuple(writes),
        scalings={module: _scaling(adapter, settings, module) for module in modules},
        ranks={entry.module: settings.rank(entry.module) for entry, _ in writes},
    )


def _scaling(adapter: Adapter, settings: Settings, module: str) -> float:
    scaling = settings.scaling(module)
    if abs(scaling) > torch.finfo(torch.float32).max:
        rule = f"the scaling {scaling} of module {module!r} overflows float32"
        raise AdapterConfigInvalid(adapter.name, None, rule)
    return scaling


def read_settings(adapter: Adapter) -> Settings:
    """The scaling fields of an adapter's configuration.

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
    )


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


def _refuse_features(adapter: Adapter) -> None:
    for field, words in _ENVELOPE_FEATURES.items():
        if adapter.config.get(field) not in (None, False, "none", [], {}):
            rule = f"it uses {words} ({field}), for which the envelope has no place"
            raise FeatureOutsideEnvelope(adapter.name, None, rule)
    for field in _OTHER_METHODS:
        if adapter.config.get(field):
            raise AdapterRefused(adapter.name, None, f"it uses {field}, which is not supported")
    init = adapter.config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        rule = f"init_lora_weights={init!r} changes the base weights when the adapter is loaded"
        raise AdapterRefused(adapter.name, None, rule)


def _unplaced(adapter: Adapter, key: str, layout: Layout) -> AdapterRefused:
    if match := _PAIR.fullmatch(key):
        module = match["module"].removeprefix("base_model.model.")
        rule = (
            f"module {module!r} is not one of the envelope's targets "
            f"({_shown(layout.envelope.target_modules)})"
        )
        return TargetOutsideEnvelope(adapter.name, key, rule)
    what = "a part of LoRA" if ".lora_" in key else "a weight of the base model"
    rule = f"it is {what} for which the envelope has no place"
    return FeatureOutsideEnvelope(adapter.name, key, rule)


def _shown(targets: str | tuple[str, ...]) -> str:
    if isinstance(targets, str):
        return targets
    more = f", and {len(targets) - 8} more" if len(targets) > 8 else ""
    return ", ".join(targets[:8]) + more


def _check_tensor(
    adapter: Adapter, entry: Entry, tensor: torch.Tensor, layout: Layout, rank: int
) -> None:
    if tensor.dtype not in _FLOATS:
        raise AdapterRefused(adapter.name, entry.key, f"dtype {tensor.dtype} is not supported")
    found, expected = list(tensor.shape), list(entry.shape)
    if len(found) != len(expected):
        raise ShapeMismatch(adapter.name, entry.key, f"its shape is {found}, not {expected}")
    if entry.rank_dim is not None:
        found_rank = found[entry.rank_dim]
        expected[entry.rank_dim] = found_rank
    if found != expected:
        rule = f"its shape is {found}, and the base model's layer needs {expected}"
        raise ShapeMismatch(adapter.name, entry.key, rule)
    if entry.rank_dim is None:
        return
    if found_rank != rank:
        rule = f"its rank is {found_rank}, and the configuration says {rank}"
        raise RankMismatch(adapter.name, entry.key, rule)
    if rank > layout.envelope.max_rank:
        rule = f"rank {rank} is above the envelope's highest rank {layout.envelope.max_rank}"
        raise RankOverEnvelope(adapter.name, entry.key, rule)
