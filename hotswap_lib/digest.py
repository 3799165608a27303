"""The digest of an adapter: BLAKE3 over its weights and the fields that change its output.

The weights are hashed in the dtype that they are stored in. The directory's name and the dropout
do not change the digest; one flipped bit or another alpha does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from blake3 import blake3

from .memory import Bytes
from .revision import Revision

# Field → PEFT's default, so that a config that contains a default and one that omits it are the
# same revision. Target modules are absent: the tensors' keys name them. So is fan_in_fan_out,
# which PEFT sets from the base layer's class.
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
}


def revision_of(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Revision:
    """The revision of an adapter; ``tensors`` have PEFT's checkpoint keys."""
    ordered = sorted(tensors)
    table = [[key, str(tensors[key].dtype), list(tensors[key].shape)] for key in ordered]
    # patterns in their own order: PEFT takes the first that matches, so their order is content
    head = json.dumps([table, _output_fields(config)], default=str)
    # BLAKE3: as collision-resistant as SHA-256 and several times faster; every swap computes it
    digest = blake3(head.encode(), max_threads=blake3.AUTO)
    for run in _runs([tensors[key] for key in ordered]):
        digest.update(run.data)
    return Revision(name, digest.hexdigest())


def tensor_digest(tensor: torch.Tensor) -> str:
    """64 hex characters for the bytes of one tensor."""
    digest = blake3(max_threads=blake3.AUTO)
    for run in _runs([tensor]):
        digest.update(run.data)
    return digest.hexdigest()


def _runs(tensors: Sequence[torch.Tensor]) -> Iterator[Bytes]:
    """The tensors' bytes in order, row-major, without a copy if they are on the CPU.

    Adjacent tensors are one run: usually all tensors of a safetensors file.
    """
    first: torch.Tensor | None = None
    begin = end = 0
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            tensor = tensor.detach().cpu().contiguous()
        start = tensor.data_ptr()
        if first is not None and start == end and end < _end_of_storage(first):
            end += tensor.nbytes
            continue
        if first is not None:
            yield _bytes(first, end - begin)
        first, begin, end = tensor, start, start + tensor.nbytes
    if first is not None:
        yield _bytes(first, end - begin)


def _end_of_storage(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.data_ptr() + storage.nbytes()


def _bytes(first: torch.Tensor, nbytes: int) -> Bytes:
    offset = int(first.storage_offset()) * first.itemsize
    run = torch.empty(0, dtype=torch.uint8)
    run.set_(first.untyped_storage(), offset, (nbytes,), (1,))
    array: Bytes = run.numpy()
    return array


def _output_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, default in OUTPUT_FIELDS.items():
        value = config.get(field)
        value = default if value is None else value
        if field == "modules_to_save" and value is not None:
            value = sorted(value) or None
        fields[field] = value
    return fields
