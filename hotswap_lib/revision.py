"""A revision: which adapter content this is. source → pack → stage → commit all carry one.

The digest covers the weights in the dtype that they are stored in and the configuration fields
that change what the adapter computes, and nothing else: renaming a directory, another dropout or
another author's comment leave it alone; one flipped bit or another alpha do not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import AdapterNameInvalid

# Field → PEFT's default, so that a config that spells a default out and one that leaves it away
# are the same revision. Target modules are absent: the tensors' keys say what is there.
OUTPUT_FIELDS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
}

_NAME = re.compile(r"[^\s@:\x00-\x1f\x7f]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Revision:
    """One immutable adapter content, shown as ``support-bot@3f2a9c1d``.

    Args:
        name: what people call it; not empty, no whitespace, control character, '@' or ':'.
        digest: 64 lower-case hex characters, the SHA-256 of the content.

    Raises:
        AdapterNameInvalid: the name breaks the rule above.
        ValueError: the digest is not 64 hex characters.
    """

    name: str
    digest: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise AdapterNameInvalid(
                self.name, None, "a name is not empty and has no whitespace, '@' or ':' in it"
            )
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"a digest is 64 hex characters, not {self.digest!r}")

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:8]}"


BASE = Revision("base", "0" * 64)
"""No adapter: the base model as it is."""


def revision_of(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Revision:
    """The revision of an adapter content; tensors under their canonical checkpoint keys."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        sha.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor_bytes(tensor))
    sha.update(json.dumps(_output_fields(config), sort_keys=True, default=str).encode())
    return Revision(name, sha.hexdigest())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a CPU tensor, row-major, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _output_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, default in OUTPUT_FIELDS.items():
        value = config.get(field)
        value = default if value is None else value
        if field == "modules_to_save" and value is not None:
            value = sorted(value) or None
        fields[field] = value
    return fields
