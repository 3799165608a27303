"""Inspect adapters without a model: their ranks and features, and an envelope that covers them.

`pack` checks whether an adapter fits a certain base model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .adapter_config import AdapterConfig
from .envelope import Envelope
from .errors import MissingTensor
from .fit import fit
from .layout import MAGNITUDE, PREFIX, SCALING, Layout, Padding, Place, lay_out
from .revision import Revision
from .source import Adapter, load_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A summary of one adapter.

    Attributes:
        revision: its name and digest.
        base_model: the base model that its configuration names.
        ranks: module → rank, for each LoRA layer.
        scalings: module → the factor of B·A.
        dtypes: dtype → bytes stored in it.
        features: the features that an envelope has to allow, beyond ranks and targets, in words.
        nbytes: of all its weights, as stored.
    """

    revision: Revision
    base_model: str | None
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    dtypes: Mapping[str, int]
    features: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingCost:
    """The bytes of an adapter's image by use. They add up to ``image_bytes``.

    Attributes:
        image_bytes: of the image, and of the slot.
        own_bytes: the adapter's own values, in the slot's dtype and at its own rank.
        rank_bytes: zeros, because its ranks are below the envelope's.
        absent_bytes: entries for tensors that it does not have: modules, biases, magnitudes.
        gap_bytes: between tensors, because each starts at a multiple of 64 bytes.
    """

    image_bytes: int
    own_bytes: int
    rank_bytes: int
    absent_bytes: int
    gap_bytes: int


def inspect_adapter(source: str | Path | Adapter) -> Inspection:
    """Summarise an adapter.

    Raises:
        AdapterRefused: it cannot be read, or its configuration is invalid.
    """
    adapter = load_adapter(source)
    config = adapter.parsed_config
    modules = _lora_modules(adapter)
    dtypes: Counter[str] = Counter()
    for tensor in adapter.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    base_model = adapter.config.get("base_model_name_or_path")
    return Inspection(
        revision=adapter.revision,
        base_model=str(base_model) if base_model else None,
        ranks={module: config.rank(module) for module in modules},
        scalings={module: config.scaling(module) for module in modules},
        dtypes=dict(dtypes),
        features=_features(adapter),
        nbytes=sum(dtypes.values()),
    )


def suggest_envelope(adapters: Iterable[str | Path | Adapter]) -> Envelope:
    """The smallest envelope that covers all of these adapters.

    Targets are named as in the adapters' configurations if those are lists that match exactly the
    modules with LoRA; otherwise by each module's full name.

    Raises:
        AdapterRefused: one of them cannot be read.
        InvalidEnvelope: no envelope holds all of them, or there are none.
    """
    loaded = [load_adapter(source) for source in adapters]
    configs = [adapter.parsed_config for adapter in loaded]
    ranks = [
        adapter.parsed_config.rank(module)
        for adapter in loaded
        for module in _lora_modules(adapter)
    ]
    biases = {config.bias for config in configs}
    return Envelope(
        max_rank=max(ranks, default=0),
        target_modules={target for adapter in loaded for target in _targets(adapter)},
        modules_to_save=sorted({name for adapter in loaded for name in _saved(adapter)}),
        use_dora=any(config.use_dora for config in configs),
        lora_bias=any(config.lora_bias for config in configs),
        bias=next(bias for bias in ("all", "lora_only", "none") if bias in biases | {"none"}),
    )


def padding_cost(source: str | Path | Adapter, layout: Layout) -> PaddingCost:
    """Count the bytes that a layout adds to an adapter. (``benchmarks.latency`` measures time.)

    Raises:
        AdapterRefused: it does not fit the layout.
    """
    fitted = fit(load_adapter(source), layout)
    written = {write.index: write for write in fitted.writes}
    own = rank = absent = 0
    for index, entry in enumerate(layout.entries):
        if index in written:
            item = getattr(torch, entry.dtype).itemsize
            own += written[index].tensor.numel() * item
            rank += entry.nbytes - written[index].tensor.numel() * item
        elif entry.is_scaling and entry.module in fitted.scalings:
            own += entry.nbytes
        else:
            absent += entry.nbytes
    return PaddingCost(
        image_bytes=layout.nbytes,
        own_bytes=own,
        rank_bytes=rank,
        absent_bytes=absent,
        gap_bytes=layout.nbytes - own - rank - absent,
    )


def sketch_layout(adapters: Sequence[Adapter], envelope: Envelope) -> Layout:
    """The layout of an envelope in a model that has only these adapters' modules.

    For `padding_cost` without a model. A model's own layout may be larger.
    """
    places: dict[str, Place] = {}
    for adapter in adapters:
        for key, tensor in adapter.tensors.items():
            if key not in places and not key.endswith("base_layer.weight"):
                places[key] = _sketch(key, tensor, adapter.parsed_config, envelope)
    for module in {place.module for place in places.values() if place.padding is not None}:
        key = f"{PREFIX}{module}.{SCALING}"
        scaling = Place(
            key=key, module=module, role=SCALING, shape=(), dtype="float32", device="cpu"
        )
        places[key] = scaling
    return lay_out(places.values(), envelope, base_model=None)


def _sketch(key: str, tensor: torch.Tensor, config: AdapterConfig, envelope: Envelope) -> Place:
    stem, found, role = key.rpartition(".lora_")
    module = stem.removeprefix(PREFIX)
    shape, padding = list(tensor.shape), None
    if role in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
        dim = 0 if "A" in role else 1
        per_index = max(1, config.rank(module) // shape[dim])
        padding = Padding(dim=dim, max_rank=envelope.max_rank, per_index=per_index)
        shape[dim] = padding.size(envelope.max_rank)
    # biases and saved modules keep the base model's dtype, which is nearest to their own
    own = str(tensor.dtype).removeprefix("torch.")
    return Place(
        key=key,
        module=module,
        role=f"lora_{role}" if found else "base",
        shape=tuple(shape),
        dtype=(envelope.dtype or "float32") if found else own,
        device="cpu",
        padding=padding,
        default="zeros" if padding is not None else "base",
    )


def _lora_modules(adapter: Adapter) -> list[str]:
    found = {
        key.rpartition(".lora_")[0].removeprefix(PREFIX)
        for key in adapter.tensors
        if ".lora_" in key
    }
    if not found:
        raise MissingTensor(adapter.name, None, "there is no LoRA tensor in it")
    return sorted(found)


def _targets(adapter: Adapter) -> Sequence[str]:
    config, modules = adapter.config, _lora_modules(adapter)
    targets = config.get("target_modules")
    narrowed = ("layers_to_transform", "exclude_modules", "layers_pattern")
    if not isinstance(targets, list) or any(config.get(field) for field in narrowed):
        return modules
    dotted = [f".{module}" for module in modules]
    matched = [t for t in targets if any(module.endswith(f".{t}") for module in dotted)]
    named = all(module.endswith(tuple(f".{t}" for t in matched)) for module in dotted)
    return matched if named else modules


def _saved(adapter: Adapter) -> list[str]:
    """The modules_to_save that the adapter has weights for.

    PEFT adds "classifier" and "score" for every classifier. A saved module may contain modules.
    """
    weights = [f"{key}." for key in adapter.tensors if ".lora_" not in key]
    return [
        name
        for name in sorted(adapter.parsed_config.modules_to_save)
        if any(f"{name}." in weight for weight in weights)
    ]


def _features(adapter: Adapter) -> tuple[str, ...]:
    config, words = adapter.parsed_config, []
    if config.use_rslora:
        words.append("rsLoRA")
    if config.use_dora or any(key.endswith(MAGNITUDE) for key in adapter.tensors):
        words.append("DoRA")
    if config.rank_pattern or config.alpha_pattern:
        words.append("rank and alpha patterns")
    if config.lora_bias:
        words.append("lora_bias")
    if config.bias != "none":
        words.append(f"bias={config.bias}")
    words += [f"saves {name}" for name in _saved(adapter)]
    return tuple(words)
