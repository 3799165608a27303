"""Reads the safetensors format from one buffer, without a copy: each tensor is a view of it.

``safetensors.torch.load`` copies every tensor once more, and its memory-mapped reader depends on a
file that may be overwritten meanwhile. The format: 8 bytes little-endian header length, a JSON
header of ``{name: {dtype, shape, data_offsets}}``, then the data (safetensors' README).
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch

from .memory import Bytes, row_major

_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def parse(content: bytes | Bytes) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file.

    Args:
        content: the file; an array is kept and read in place, bytes are copied once.

    Raises:
        ValueError: its text continues a sentence that begins with the file's name.
    """
    # torch requires writable memory
    buffer = np.frombuffer(bytearray(content), np.uint8) if isinstance(content, bytes) else content
    header, _, start = read_header(buffer)
    specs = {}
    end = 0
    for name, spec in sorted(header.items(), key=lambda item: _offsets(*item)):
        specs[name] = _check_spec(name, spec, end)
        end = specs[name][1]
    if start + end != len(buffer):
        raise ValueError(
            f"is truncated or corrupt: its header describes {start + end} bytes and it has "
            f"{len(buffer)}"
        )
    return _tensors(torch.from_numpy(buffer)[start:], specs)


_Spec = tuple[int, int, torch.dtype, list[int]]


def read_header(buffer: Bytes) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Parse the header of a safetensors file.

    Returns:
        name → dtype, shape and offsets; the file's metadata; the offset of its data in bytes.

    Raises:
        ValueError: as `parse`.
    """
    length = int.from_bytes(buffer[:8].tobytes(), "little")
    if len(buffer) < 8 or length > min(_HEADER_LIMIT_BYTES, len(buffer) - 8):
        raise ValueError("is truncated or is not a safetensors file: its header does not fit in it")
    try:
        header = json.loads(buffer[8 : 8 + length].tobytes())
    except ValueError as error:
        raise ValueError(f"has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("has a header that is not a JSON object")
    metadata = header.pop("__metadata__", None)
    return header, metadata if isinstance(metadata, dict) else {}, 8 + length


def _offsets(name: str, spec: Any) -> tuple[int, int]:
    try:
        begin, end = spec["data_offsets"]
        return int(begin), int(end)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"has a header without offsets for tensor {name!r}") from error


def _check_spec(name: str, spec: dict[str, Any], previous_end: int) -> _Spec:
    begin, end = _offsets(name, spec)
    dtype = _DTYPES.get(str(spec.get("dtype")))
    if dtype is None:
        raise ValueError(f"has tensor {name!r} of unknown dtype {spec.get('dtype')!r}")
    shape = spec.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"has tensor {name!r} of invalid shape {shape!r}")
    if begin != previous_end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"is corrupt: tensor {name!r} has offsets {begin} to {end}")
    return begin, end, dtype, shape


def _tensors(data: torch.Tensor, specs: dict[str, _Spec]) -> dict[str, torch.Tensor]:
    typed: dict[torch.dtype, torch.Tensor] = {}
    tensors = {}
    for name, (begin, end, dtype, shape) in specs.items():
        if (data.storage_offset() + begin) % dtype.itemsize:  # legal, and rare
            tensors[name] = data[begin:end].clone().view(dtype).view(shape)
            continue
        if dtype not in typed:
            first = -data.storage_offset() % dtype.itemsize
            whole = (len(data) - first) // dtype.itemsize * dtype.itemsize
            typed[dtype] = data[first : first + whole].view(dtype)
        flat = typed[dtype]
        offset = (data.storage_offset() + begin) // dtype.itemsize
        # one call for each tensor: there are hundreds of them in an adapter
        tensors[name] = flat.as_strided(shape, row_major(shape), offset)
    return tensors
