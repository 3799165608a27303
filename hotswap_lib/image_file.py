"""Images as files: pack once, in CI, and load the file into every slot of the layout.

The file is an ordinary safetensors file: one uint8 tensor for each block, and everything else as
JSON in its metadata. Its data starts at a multiple of 64 bytes, so that mapped blocks are aligned
like allocated ones; the safetensors library accepts this.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ImageUnreadable
from .image import AdapterImage
from .memory import ALIGNMENT
from .revision import Revision
from .safetensors_bytes import read_header

_FORMAT = "hotswap-image-1"


def save_image(image: AdapterImage, path: str | Path) -> None:
    """Write an image. The file is replaced as a whole and never changed in place.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    header = _header(image)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little"))
            stream.write(header)
            for block in image.blocks:
                stream.write(block.data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _header(image: AdapterImage) -> bytes:
    described = {
        "revision": [image.revision.name, image.revision.digest],
        "layout_fingerprint": image.layout_fingerprint,
        "config": dict(image.config),
        "ranks": dict(image.ranks),
        "written": list(image.written),
        "digest": image.digest,
    }
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "image": json.dumps(described)}}
    end = 0
    for index, block in enumerate(image.blocks):
        begin, end = end, end + block.nbytes
        header[f"block.{index}"] = {
            "dtype": "U8",
            "shape": [block.nbytes],
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header).encode()
    return raw + b" " * (-(8 + len(raw)) % ALIGNMENT)


def load_image(path: str | Path) -> AdapterImage:
    """Map an image file into memory. A slot reads and checks its bytes when it stages the image.

    The file must not change while the image exists; `save_image` replaces files and never writes
    into one.

    Raises:
        ImageUnreadable: there is no such file, or it is not an image.
    """
    where = str(path)
    try:
        mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        header, metadata, start = read_header(mapped)
    except (OSError, ValueError) as error:
        raise ImageUnreadable(where, f"the file cannot be read: {error}") from error
    if metadata.get("format") != _FORMAT:
        rule = f"the file has format {metadata.get('format')!r}, and not {_FORMAT!r}"
        raise ImageUnreadable(where, rule)
    try:
        described = json.loads(metadata["image"])
        spans = [header[f"block.{index}"]["data_offsets"] for index in range(len(header))]
        image = AdapterImage(
            revision=Revision(*described["revision"]),
            layout_fingerprint=described["layout_fingerprint"],
            blocks=tuple(mapped[start + begin : start + end] for begin, end in spans),
            config=described["config"],
            ranks=described["ranks"],
            written=tuple(described["written"]),
            arrived_as=described["digest"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ImageUnreadable(where, f"its description is incomplete: {error}") from error
    if start + sum(end - begin for begin, end in spans) != len(mapped):
        raise ImageUnreadable(where, "the file is truncated")
    return image
