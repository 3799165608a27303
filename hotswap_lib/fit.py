"""Match an adapter with a layout: every rule about adapters that a layout decides.

Reads only the configuration, keys, shapes and dtypes. `hotswap_lib.image` checks that the values
are finite, on the packed bytes, after the cast into the slot's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .adapter_config import AdapterConfig, refuse_unsupported
from .digest import tensor_digest
from .envelope import Envelope
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
from .layer_kinds import LORA_BIAS
from .layout import BIAS, MAGNITUDE, PREFIX, SAVED, Entry, Layout
from .source import Adapter

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PAIR = re.compile(r"(?P<module>.+)\.lora_(embedding_)?[AB](\.weight)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One tensor of the adapter, and its entry in the layout.

    Attributes:
        index: of the entry in the layout.
        entry: the position that it is written to.
        tensor: as it is in the checkpoint.
        rank: the adapter's rank for this module; 0 where the shape does not depend on it.
    """

    index: int
    entry: Entry
    tensor: torch.Tensor
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """An adapter that fits: the tensors to write.

    Attributes:
        writes: in the layout's order.
        scalings: module → scaling; only modules with LoRA in the adapter.
        ranks: module → the adapter's own rank, unpadded.
    """

    writes: tuple[Write, ...]
    scalings: Mapping[str, float]
    ranks: Mapping[str, int]


def fit(adapter: Adapter, layout: Layout) -> Fit:
    """Match an adapter with a layout.

    Raises:
        AdapterRefused: the subclass for the rule that it breaks.
    """
    config = adapter.parsed_config
    refuse_unsupported(adapter.name, adapter.config)
    _refuse_features(adapter, layout.envelope)
    tensors = _by_entry(adapter, layout)
    _check_keys(adapter, layout, tensors)
    ranks = _ranks(adapter, layout, tensors)
    writes = []
    for index, entry in enumerate(layout.entries):
        tensor = None if entry.is_scaling else tensors.get(entry.key)
        if tensor is None:
            _check_absent(adapter, entry, ranks)
            continue
        rank = ranks.get(entry.module, 0)
        _check_tensor(adapter, entry, tensor, rank)
        writes.append(Write(index=index, entry=entry, tensor=tensor, rank=rank))
    return Fit(
        writes=tuple(writes),
        scalings={module: _scaling(adapter, config, module) for module in ranks},
        ranks=ranks,
    )


def _check_keys(adapter: Adapter, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
    """Every tensor needs an entry, and the configuration has to announce it."""
    entries = {entry.key: entry for entry in layout.entries if not entry.is_scaling}
    carried = {key for key in layout.base_weights if key in adapter.tensors}
    for key in sorted(carried):
        _check_base_weight(adapter, key, layout)
    for key in sorted(tensors.keys() - carried):
        if key not in entries:
            raise _without_entry(adapter, key, layout)
        _check_configured(adapter, entries[key])


def _ranks(adapter: Adapter, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    config = adapter.parsed_config
    ranks = {
        entry.module: config.rank(entry.module)
        for entry in layout.entries
        if entry.padding is not None and entry.key in tensors
    }
    for module in ranks:  # PEFT would ignore such tensors without an error
        if not config.has_lora_on(module):
            rule = f"it has LoRA on {module!r}, which its configuration does not target"
            raise AdapterConfigInvalid(adapter.name, None, rule)
    if not ranks:
        raise MissingTensor(adapter.name, None, "there is no LoRA tensor in it")
    return ranks


def _by_entry(adapter: Adapter, layout: Layout) -> dict[str, torch.Tensor]:
    # An adapter with bias="all" names the bias of a module that it has no LoRA on without
    # "base_layer"; the slot may have LoRA on that module.
    names = {
        entry.key.replace(".base_layer.bias", ".bias"): entry.key
        for entry in layout.entries
        if entry.role == BIAS
    }
    return {names.get(key, key): tensor for key, tensor in adapter.tensors.items()}


def _scaling(adapter: Adapter, config: AdapterConfig, module: str) -> float:
    scaling = config.scaling(module)
    if abs(scaling) > torch.finfo(torch.float32).max:
        rule = f"the scaling {scaling} of module {module!r} overflows float32"
        raise AdapterConfigInvalid(adapter.name, None, rule)
    return scaling


def _refuse_features(adapter: Adapter, envelope: Envelope) -> None:
    for field in ("use_dora", "lora_bias", "modules_to_save"):
        asked, given = getattr(adapter.parsed_config, field), getattr(envelope, field)
        if asked and not given:  # even if the tensors are missing: PEFT would initialise them
            rule = f"it has {field}={adapter.config[field]!r}, and the envelope has {given!r}"
            raise FeatureOutsideEnvelope(adapter.name, None, rule)


def _check_base_weight(adapter: Adapter, key: str, layout: Layout) -> None:
    dtype, digest = layout.base_weights[key]
    if not digest:
        rule = "it is a base weight, and the layout was made without the base model's weights"
        raise FeatureOutsideEnvelope(adapter.name, key, rule)
    if tensor_digest(adapter.tensors[key].to(getattr(torch, dtype))) != digest:
        rule = "it is a base weight, and not the one that this base model has"
        raise FeatureOutsideEnvelope(adapter.name, key, rule)


def _without_entry(adapter: Adapter, key: str, layout: Layout) -> AdapterRefused:
    envelope = layout.envelope
    if match := _PAIR.fullmatch(key):
        module = match["module"].removeprefix(PREFIX)
        rule = (
            f"module {module!r} is not one of the envelope's targets "
            f"({_shown(envelope.target_modules)})"
        )
        return TargetOutsideEnvelope(adapter.name, key, rule)
    if key.endswith(".lora_magnitude_vector"):
        what = "it is a DoRA magnitude that the envelope does not cover"
    elif key.endswith(".lora_B.bias"):
        what = "it is a bias of lora_B that the envelope does not cover"
    elif key.endswith(".bias") and adapter.config.get("bias", "none") != "none":
        what = f"it is a trained bias, and the envelope has bias={envelope.bias!r}"
    elif ".lora_" in key:
        what = "it is a LoRA tensor of a kind that no envelope supports"
    else:
        saved = _shown(envelope.modules_to_save) if envelope.modules_to_save else "none"
        what = f"it is a weight of the base model, and of no saved module of the envelope ({saved})"
    return FeatureOutsideEnvelope(adapter.name, key, what)


def _shown(targets: str | tuple[str, ...]) -> str:
    if isinstance(targets, str):
        return targets
    more = f", and {len(targets) - 8} more" if len(targets) > 8 else ""
    return ", ".join(targets[:8]) + more


def _check_configured(adapter: Adapter, entry: Entry) -> None:
    """Rejects a tensor that has an entry, and that the configuration does not announce."""
    config, rule = adapter.parsed_config, None
    if entry.role == MAGNITUDE and not config.use_dora:
        rule = "it is a DoRA magnitude, and the configuration says use_dora=False"
    elif entry.role == LORA_BIAS.suffix and not config.lora_bias:
        rule = "it is a bias of lora_B, and the configuration says lora_bias=False"
    elif entry.role == BIAS and config.bias == "none":
        rule = "it is a trained bias, and the configuration says bias='none'"
    elif entry.role == SAVED and not config.saves(entry.module):
        rule = f"module {entry.module!r} is not in the configuration's modules_to_save"
    if rule is not None:
        raise AdapterConfigInvalid(adapter.name, entry.key, rule)


def _check_absent(adapter: Adapter, entry: Entry, ranks: Mapping[str, int]) -> None:
    """Rejects an adapter that needs a tensor for this entry and does not have it."""
    config, rule = adapter.parsed_config, None
    if entry.role == SAVED and config.saves(entry.module):
        rule = f"the configuration saves module {entry.module!r}, and it is not there"
    elif entry.module not in ranks:
        return
    elif entry.padding is not None:
        rule = "its LoRA pair is there and it is not"
    elif entry.role == MAGNITUDE and config.use_dora:
        rule = "the configuration says use_dora=True, and it is not there"
    elif entry.role == LORA_BIAS.suffix and config.lora_bias:
        rule = "the configuration says lora_bias=True, and it is not there"
    if rule is not None:
        raise MissingTensor(adapter.name, entry.key, rule)


def _check_tensor(adapter: Adapter, entry: Entry, tensor: torch.Tensor, rank: int) -> None:
    expected_dtype = getattr(torch, entry.dtype)
    if tensor.dtype != expected_dtype and not {tensor.dtype, expected_dtype} <= _FLOATS:
        raise AdapterRefused(adapter.name, entry.key, f"dtype {tensor.dtype} is not supported")
    found, expected = list(tensor.shape), list(entry.shape)
    if len(found) != len(expected):
        raise ShapeMismatch(adapter.name, entry.key, f"its shape is {found}, not {expected}")
    padding = entry.padding
    if padding is not None:
        expected[padding.dim] = found[padding.dim]
    if found != expected:
        rule = f"its shape is {found}, and the base model's layer needs {expected}"
        raise ShapeMismatch(adapter.name, entry.key, rule)
    if padding is None:
        return
    shares = padding.groups * padding.per_index
    if rank % shares:
        rule = f"rank {rank} is not a multiple of the convolution's {shares} groups"
        raise RankMismatch(adapter.name, entry.key, rule)
    if found[padding.dim] != padding.size(rank):
        found_rank = found[padding.dim] * padding.per_index
        rule = f"its rank is {found_rank}, and the configuration says {rank}"
        raise RankMismatch(adapter.name, entry.key, rule)
    if rank > padding.max_rank:
        rule = f"rank {rank} is above the envelope's highest rank {padding.max_rank}"
        raise RankOverEnvelope(adapter.name, entry.key, rule)
