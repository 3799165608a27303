"""Reads the safetensors format from one buffer, without a copy: each tensor is a view of it.

``safetensors.torch.load`` copies every tensor once more, and its memory-mapped reader depends on a
file that somebody else may overwrite. The format: 8 bytes little-endian header length, a JSON
header of ``{name: {dtype, shape, data_offsets}}``, then the data (safetensors' README).
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

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


def parse(content: bytes | bytearray) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file.

    Raises:
        ValueError: with what is wrong, as the end of a sentence that begins with the file's name.
    """
    # torch wants writable memory; a bytes object is copied once, a bytearray is not
    buffer = content if isinstance(content, bytearray) else bytearray(content)
    header, start = _header(buffer)
    tensors = {}
    end = 0
    for name, spec in sorted(header.items(), key=lambda item: _offsets(*item)):
        begin, end = _check_spec(name, spec, end)
        tensors[name] = _tensor(buffer, spec, start + begin, start + end)
    if start + end != len(buffer):
        raise ValueError(
            f"is truncated or corrupt: its header describes {start + end} bytes and it has "
            f"{len(buffer)}"
        )
    return tensors


def _header(buffer: bytearray) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or length > min(_HEADER_LIMIT_BYTES, len(buffer) - 8):
        raise ValueError("is truncated or is not a safetensors file: its header does not fit in it")
    try:
        header = json.loads(buffer[8 : 8 + length])
    except ValueError as error:
        raise ValueError(f"has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("has a header that is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _offsets(name: str, spec: Any) -> tuple[int, int]:
    try:
        begin, end = spec["data_offsets"]
        return int(begin), int(end)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"has a header without offsets for tensor {name!r}") from error


def _check_spec(name: str, spec: dict[str, Any], previous_end: int) -> tuple[int, int]:
    begin, end = _offsets(name, spec)
    dtype = _DTYPES.get(str(spec.get("dtype")))
    if dtype is None:
        raise ValueError(f"has tensor {name!r} of unknown dtype {spec.get('dtype')!r}")
    shape = spec.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"has tensor {name!r} of invalid shape {shape!r}")
    if begin != previous_end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"is corrupt: tensor {name!r} has offsets {begin} to {end}")
    return begin, end


def _tensor(buffer: bytearray, spec: dict[str, Any], begin: int, end: int) -> torch.Tensor:
    dtype, shape = _DTYPES[spec["dtype"]], spec["shape"]
    if begin == end or end > len(buffer):  # past the end: the caller reports the whole file
        return torch.empty(shape if begin == end else 0, dtype=dtype)
    count = (end - begin) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin).view(shape)
