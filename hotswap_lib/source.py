"""Sources: where adapters come from. The first stage: source → pack → stage → commit.

A directory, an fsspec URI, a Hub repository, a PEFT model or tensors in memory all become an
`Adapter`: a snapshot of configuration and weights whose revision is computed once. Nothing here
knows a base model; whether an adapter fits one is for `hotswap_lib.image` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import hub, safetensors_bytes
from .digest import revision_of
from .errors import AdapterConfigInvalid, AdapterFormatRefused, AdapterNotFound
from .layout import PREFIX
from .memory import Bytes, allocate
from .revision import Revision

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_UNNAMEABLE = re.compile(r"[\s@:\x00-\x1f\x7f]+")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """One adapter's whole content, on the host.

    Args:
        name: what its revision is called.
        config: the content of ``adapter_config.json``, or ``LoraConfig.to_dict()``.
        tensors: weights under PEFT's checkpoint keys, without an adapter name in them. Keys that
            were saved from a compiled model lose their ``_orig_mod.``.

    The revision is computed here, over the bytes as they are now: hand over tensors that nobody
    writes to afterwards (`from_peft_model` makes copies).

    Raises:
        AdapterNameInvalid: the name cannot be a revision's name.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    revision: Revision = field(init=False)

    def __post_init__(self) -> None:
        tensors = {_canonical(key): value for key, value in self.tensors.items()}
        object.__setattr__(self, "config", _plain(self.config))
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "revision", revision_of(self.name, self.config, tensors))

    @classmethod
    def from_peft_model(
        cls, model: torch.nn.Module, adapter_name: str = "default", *, name: str | None = None
    ) -> Adapter:
        """Copy the adapter out of a live PeftModel; ``name`` defaults to the adapter's name.

        Raises:
            AdapterNotFound: the model has no adapter of that name.
        """
        from peft import get_peft_model_state_dict

        from .slot_registry import show_as_live

        model = getattr(model, "_orig_mod", model)
        peft_config = getattr(model, "peft_config", {})
        if adapter_name not in peft_config:
            rule = f"the model has {sorted(peft_config) or 'no adapters'}"
            raise AdapterNotFound(adapter_name, None, rule)
        # not model.state_dict(), in which bitsandbytes repacks the weights of a live model
        held = dict(model.named_parameters(remove_duplicate=False))
        held.update(model.named_buffers(remove_duplicate=False))
        show_as_live(model, held)
        state = get_peft_model_state_dict(
            model, state_dict=held, adapter_name=adapter_name, save_embedding_layers=False
        )
        tensors = {
            # a model that is no PeftModel (diffusers') has keys without PEFT's prefix
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

    Args:
        source: a directory, a URI that fsspec opens (``s3://…``, ``file://…``), a Hub id, or an
            `Adapter`, which comes back as it is (under ``name`` if that is given).
        name: the revision's name; the last part of the source where it is left out.
        revision: for a Hub id: branch, tag or commit. It is resolved to one commit first.
        token: for a Hub id: as in huggingface_hub.
        cache_dir: for a Hub id: as in huggingface_hub.
        subfolder: the folder inside the source that holds the adapter.

    The weights are read into memory rather than mapped: a file that is overwritten in place later
    can neither change an adapter under its digest nor kill the process with SIGBUS.

    Raises:
        AdapterNotFound, AdapterConfigInvalid, AdapterFormatRefused, AdapterNameInvalid
    """
    if isinstance(source, Adapter):
        if name is None or name == source.name:
            return source
        return Adapter(name=name, config=source.config, tensors=source.tensors)
    where = str(source)
    label = name or _default_name(where, subfolder)
    if "://" in where:
        read = _uri_reader(label, where, subfolder)
    elif isinstance(source, Path) or _is_folder(where):
        read = _directory_reader(label, Path(where) / (subfolder or ""))
    else:
        read = hub.reader(
            label, where, revision=revision, token=token, cache_dir=cache_dir, subfolder=subfolder
        )
    return _read_adapter(label, read)


Reader = Callable[[str], bytes | Bytes | None]
"""File name → its bytes, or None where there is no such file."""


def _is_folder(where: str) -> bool:
    try:
        return Path(where).is_dir()
    except OSError:  # longer than any path
        return False


def _read_adapter(label: str, read: Reader) -> Adapter:
    raw_config = read(CONFIG_FILE)
    weights = read(WEIGHTS_FILE)
    if raw_config is None and weights is None and read(PICKLE_FILE) is None:
        raise AdapterNotFound(label, None, f"there is no {CONFIG_FILE} and no {WEIGHTS_FILE} there")
    if raw_config is None:
        raise AdapterConfigInvalid(label, None, f"there is no {CONFIG_FILE} beside the weights")
    try:
        config = json.loads(bytes(raw_config))
    except ValueError as error:
        raise AdapterConfigInvalid(
            label, None, f"{CONFIG_FILE} is not valid JSON: {error}"
        ) from error
    if not isinstance(config, dict):
        raise AdapterConfigInvalid(label, None, f"{CONFIG_FILE} is not a JSON object")
    if weights is None and read(PICKLE_FILE) is not None:
        raise AdapterFormatRefused(
            label, None, f"{PICKLE_FILE} is a pickle, and only safetensors weights are read"
        )
    if weights is None:
        raise AdapterNotFound(label, None, f"there is no {WEIGHTS_FILE} there")
    try:
        tensors = safetensors_bytes.parse(weights)
    except ValueError as error:
        raise AdapterFormatRefused(label, None, f"{WEIGHTS_FILE} {error}") from error
    return Adapter(name=label, config=config, tensors=tensors)


def _directory_reader(label: str, folder: Path) -> Reader:
    if not folder.is_dir():
        raise AdapterNotFound(label, None, f"there is no directory {str(folder)!r}")

    def read(file: str) -> bytes | Bytes | None:
        path = folder / file
        if not path.is_file():
            return None
        if file == PICKLE_FILE:
            return b""  # that it is there is all that anyone may know of it
        try:
            content = allocate(path.stat().st_size)
            with path.open("rb", buffering=0) as stream:
                size = _read_fully(stream.readinto, content.data)
        except OSError as error:
            raise AdapterNotFound(label, None, f"{str(path)!r} cannot be read: {error}") from error
        return content[:size]

    return read


def _read_fully(readinto: Callable[[memoryview], int | None], target: memoryview) -> int:
    size = 0
    while size < len(target) and (read := readinto(target[size:])):
        size += read
    return size


def _uri_reader(label: str, uri: str, subfolder: str | None) -> Reader:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise AdapterNotFound(label, None, f"{uri!r} cannot be opened: {error}") from error
    folder = "/".join(part.rstrip("/") for part in (root, subfolder) if part)

    def read(file: str) -> bytes | None:
        path = f"{folder}/{file}"
        try:
            if file == PICKLE_FILE:
                return b"" if filesystem.exists(path) else None
            return bytes(filesystem.cat_file(path))
        except FileNotFoundError:
            return None
        except Exception as error:  # every storage backend has error classes of its own
            raise AdapterNotFound(label, None, f"{uri!r} cannot be read: {error}") from error

    return read


def _default_name(where: str, subfolder: str | None) -> str:
    path = (subfolder or where.partition("://")[2] or where).rstrip("/")
    return _UNNAMEABLE.sub("-", Path(path).name or Path(path).resolve().name) or "adapter"


def _canonical(key: str) -> str:
    key = key.replace("_orig_mod.", "")
    if key.endswith(".lora_magnitude_vector.weight"):  # PEFT reads both spellings
        key = key.removesuffix(".weight")
    return key


def _plain(value: Any) -> Any:
    """The JSON form of a PEFT config value: enums by value, sets sorted."""
    if isinstance(value, Mapping):
        return {str(getattr(k, "value", k)): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
