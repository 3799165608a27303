from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from hotswap_lib.safetensors_bytes import parse

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(2, dtype=torch.float64).to(torch.bfloat16),
    "scalar": torch.tensor(3.0, dtype=torch.float16),
    "empty": torch.empty(0, 4),
}


def rewritten(change: Callable[[dict[str, Any]], None]) -> bytes:
    content: bytes = save(TENSORS)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]


def test_what_safetensors_writes_is_read_back_bit_for_bit() -> None:
    parsed = parse(save(TENSORS, metadata={"format": "pt"}))
    assert parsed.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert parsed[name].dtype == tensor.dtype
        assert torch.equal(parsed[name], tensor)


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1, -30])
def test_a_truncated_file_is_refused(size: int) -> None:
    content = save(TENSORS)
    with pytest.raises(ValueError, match=r"truncated|corrupt"):
        parse(content[:size] if size >= 0 else content[: len(content) + size])


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="truncated or corrupt"):
        parse(save(TENSORS) + b"x")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["b"].update(dtype="F4"),
        lambda header: header["b"].update(shape=[3, -5]),
        lambda header: header["b"].update(shape=[3, 6]),
        lambda header: header["b"].update(shape=None),
        lambda header: header["b"].update(data_offsets=[4, 64]),
        lambda header: header["b"].pop("data_offsets"),
        lambda header: header.update(b=3),
    ],
)
def test_a_header_that_lies_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(ValueError, match=r"tensor 'b'"):
        parse(rewritten(change))


@pytest.mark.parametrize("header", [b"[1]", b"{nonsense", b"\xff\xfe"])
def test_a_header_that_is_no_json_object_is_refused(header: bytes) -> None:
    with pytest.raises(ValueError, match="header"):
        parse(len(header).to_bytes(8, "little") + header)
