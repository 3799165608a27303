"""Sources: read adapters from directories, URIs, the Hub and live models. The first stage.

source → pack → stage → commit. Every source becomes an `Adapter`: a snapshot of configuration and
weights whose revision is computed once. Nothing here depends on a base model; `hotswap_lib.fit`
checks an adapter against one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict

from . import adapter_files, safetensors_bytes, slot_registry, torch_internals
from .adapter_config import AdapterConfig
from .adapter_files import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, Reader
from .digest import revision_of
from .errors import AdapterConfigInvalid, AdapterFormatRefused, AdapterNotFound
from .layout import PREFIX
from .revision import Revision

_UNNAMEABLE = re.compile(r"[\s@:\x00-\x1f\x7f]+")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """One adapter's whole content, on the host.

    Args:
        name: the name of its revision.
        config: the content of ``adapter_config.json``, or ``LoraConfig.to_dict()``.
        tensors: weights under PEFT's checkpoint keys, without an adapter name in them. Keys that
            were saved from a compiled model lose their ``_orig_mod.``.

    Attributes:
        revision: computed here, over the bytes as they are now. Pass tensors that are not written
            to afterwards (`from_peft_model` makes copies).
        parsed_config: the fields of ``config`` that matter to a slot, checked.

    Raises:
        AdapterNameInvalid: the name cannot be a revision's name.
        AdapterConfigInvalid: it is not LoRA, or a field has an invalid type or value.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    revision: Revision = field(init=False)
    parsed_config: AdapterConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config = _as_json(self.config)
        tensors = {_canonical(key): value for key, value in self.tensors.items()}
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "revision", revision_of(self.name, config, tensors))
        object.__setattr__(self, "parsed_config", AdapterConfig.parse(self.name, config))

    @classmethod
    def from_peft_model(
        cls, model: torch.nn.Module, adapter_name: str = "default", *, name: str | None = None
    ) -> Adapter:
        """Copy the adapter out of a live PeftModel; ``name`` defaults to the adapter's name.

        Raises:
            AdapterNotFound: the model has no adapter of that name.
            AdapterConfigInvalid: the adapter is not LoRA.
        """
        model = torch_internals.unwrap(model)
        peft_config = getattr(model, "peft_config", {})
        if adapter_name not in peft_config:
            rule = f"the model has {sorted(peft_config) or 'no adapters'}"
            raise AdapterNotFound(adapter_name, None, rule)
        # not model.state_dict(), in which bitsandbytes repacks the weights of a live model
        held: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        held.update(model.named_buffers(remove_duplicate=False))
        slot_registry.show_live(model, held)
        state = get_peft_model_state_dict(
            model, state_dict=held, adapter_name=adapter_name, save_embedding_layers=False
        )
        tensors = {
            # a model that is not a PeftModel (diffusers') has keys without PEFT's prefix
            key if key.startswith(PREFIX) else PREFIX + key: value.detach().to("cpu", copy=True)
            for key, value in state.items()
        }
        config = peft_config[adapter_name].to_dict()
        return cls(name=name or adapter_name, config=config, tensors=tensors)


def load_adapter(
    source: str | Path | Adapter,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Read an adapter; configuration and weights once each.

    The weights are read into memory and not mapped, so that overwriting the file later neither
    changes the adapter nor kills the process with SIGBUS.

    Args:
        source: a directory, a URI that fsspec opens (``s3://…``, ``file://…``), a Hub id, or an
            `Adapter`, which is returned as it is (under ``name`` if that is given).
        name: the revision's name; by default the last part of the source.
        revision: for a Hub id: branch, tag or commit. It is resolved to one commit first.
        token: for a Hub id: as in huggingface_hub.
        cache_dir: for a Hub id: as in huggingface_hub.
        subfolder: the folder inside the source that holds the adapter.

    Raises:
        AdapterNotFound, AdapterConfigInvalid, AdapterFormatRefused, AdapterNameInvalid
    """
    if isinstance(source, Adapter):
        if name is None or name == source.name:
            return source
        return Adapter(name=name, config=source.config, tensors=source.tensors)
    where, folder = str(source), subfolder or ""
    label = name or _default_name(where, subfolder)
    if "://" in where:
        read = adapter_files.in_uri(label, where, subfolder)
    elif isinstance(source, Path) or _is_folder(where):
        read = adapter_files.in_directory(label, Path(where) / folder)
    else:
        read = adapter_files.on_hub(
            label, where, subfolder, revision=revision, token=token, cache_dir=cache_dir
        )
    return _read_adapter(label, read)


def _is_folder(where: str) -> bool:
    try:
        return Path(where).is_dir()
    except OSError:  # longer than any path
        return False


def _read_adapter(label: str, read: Reader) -> Adapter:
    raw_config, weights = read(CONFIG_FILE), read(WEIGHTS_FILE)
    has_pickle = weights is None and read(PICKLE_FILE) is not None
    if raw_config is None and weights is None and not has_pickle:
        raise AdapterNotFound(label, None, f"there is no {CONFIG_FILE} and no {WEIGHTS_FILE} there")
    if raw_config is None:
        raise AdapterConfigInvalid(label, None, f"there is no {CONFIG_FILE} with the weights")
    try:
        config = json.loads(bytes(raw_config))
    except ValueError as error:
        rule = f"{CONFIG_FILE} is not valid JSON: {error}"
        raise AdapterConfigInvalid(label, None, rule) from error
    if not isinstance(config, dict):
        raise AdapterConfigInvalid(label, None, f"{CONFIG_FILE} is not a JSON object")
    if has_pickle:
        rule = f"{PICKLE_FILE} is a pickle, and only safetensors weights are read"
        raise AdapterFormatRefused(label, None, rule)
    if weights is None:
        raise AdapterNotFound(label, None, f"there is no {WEIGHTS_FILE} there")
    try:
        tensors = safetensors_bytes.parse(weights)
    except ValueError as error:
        raise AdapterFormatRefused(label, None, f"{WEIGHTS_FILE} {error}") from error
    return Adapter(name=label, config=config, tensors=tensors)


def _default_name(where: str, subfolder: str | None) -> str:
    path = (subfolder or where.partition("://")[2] or where).rstrip("/")
    return _UNNAMEABLE.sub("-", Path(path).name or Path(path).resolve().name) or "adapter"


def _canonical(key: str) -> str:
    key = key.replace("_orig_mod.", "")
    if key.endswith(".lora_magnitude_vector.weight"):  # PEFT reads both spellings
        key = key.removesuffix(".weight")
    return key


def _as_json(value: Any) -> Any:
    """The JSON form of a PEFT config value: enums by value, sets sorted."""
    if isinstance(value, Mapping):
        return {str(getattr(k, "value", k)): _as_json(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_as_json(item) for item in value)
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return getattr(value, "value", value)
