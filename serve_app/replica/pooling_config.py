"""The pooling that a text encoder was trained with, from the files of its repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from transformers.utils import cached_file, has_file

from serve_app.engine.pooling import Pooling
from serve_app.replica.model_task import UnsupportedModel, reads_forward
from serve_app.settings import Settings

# sentence-transformers: names of its 1_Pooling/config.json -> ours
_MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_of(config: Any, settings: Settings, path: str) -> Pooling:
    """Returns the pooling of the settings, else of the model's files, else the usual one.

    That is the last token for a decoder and the mean for an encoder.

    Raises:
        UnsupportedModel: the files of the model need a pooling or layers that are not available.
    """
    layers = _read(settings, path, "modules.json") or []
    more = [kind for kind in (str(layer.get("type", "")) for layer in layers) if "Dense" in kind]
    if more:
        why = f"it ends in {more[0]}, a layer outside of the transformers model"
        raise UnsupportedModel(settings.model, why)
    if settings.pooling != "auto":
        return settings.pooling
    own = _read(settings, path, "1_Pooling/config.json")
    if own is None:
        return "last" if reads_forward(config) else "mean"
    modes = _modes(own)
    if len(modes) != 1 or modes[0] not in _MODES:
        why = f"its pooling is {'+'.join(modes) or 'unknown'}; set pooling to mean, cls or last"
        raise UnsupportedModel(settings.model, why)
    return _MODES[modes[0]]


def _modes(own: Mapping[str, Any]) -> list[str]:
    """Returns the modes of a 1_Pooling/config.json: flags, or a name since version 5."""
    if named := own.get("pooling_mode"):
        return [named] if isinstance(named, str) else list(named)
    chosen = (name for name, value in own.items() if name.startswith("pooling_mode_") and value)
    return [_FLAGS.get(name, name.removeprefix("pooling_mode_")) for name in chosen]


def _read(settings: Settings, path: str, name: str) -> Any:
    """Returns a JSON file of the model's repository, or None if there is none."""
    revision = settings.model_revision
    try:
        exists = has_file(path, name, revision=revision)
    except httpx.ProxyError:  # the Hub is out of reach: what is in the cache counts
        exists = has_file(path, name, revision=revision, local_files_only=True)
    if not exists:
        return None
    found = cached_file(path, name, revision=revision)
    return json.loads(Path(found).read_text())
