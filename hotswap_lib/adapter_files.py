"""Read the files of an adapter from a directory, a URI or the Hub.

Each function returns a `Reader`. Its calls raise AdapterNotFound, under the adapter's name
``label``, if the place cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import hub
from .errors import AdapterNotFound
from .memory import Bytes, allocate

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

Reader = Callable[[str], bytes | Bytes | None]
"""File name → its bytes, or None if there is no such file. A pickle's bytes are left empty."""


def in_directory(label: str, folder: Path) -> Reader:
    """Read an adapter's files from a directory.

    Raises:
        AdapterNotFound: there is no such directory.
    """
    if not folder.is_dir():
        raise AdapterNotFound(label, None, f"there is no directory {str(folder)!r}")

    def read(file: str) -> bytes | Bytes | None:
        if not (folder / file).is_file():
            return None
        return b"" if file == PICKLE_FILE else _read_file(label, folder / file)

    return read


def on_hub(
    label: str,
    repo_id: str,
    subfolder: str | None,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Reader:
    """Read an adapter's files from one commit of a Hub repository.

    Raises:
        AdapterNotFound: the id is invalid, or the repository cannot be read.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    snapshot = hub.download(
        label,
        repo_id,
        files=[prefix + CONFIG_FILE, prefix + WEIGHTS_FILE],
        revision=revision,
        token=token,
        cache_dir=cache_dir,
    )

    def read(file: str) -> bytes | Bytes | None:
        if file == PICKLE_FILE:
            found = hub.has_file(label, repo_id, snapshot, prefix + file, token=token)
            return b"" if found else None
        path = snapshot / (prefix + file)
        return _read_file(label, path) if path.is_file() else None

    return read


def in_uri(label: str, uri: str, subfolder: str | None) -> Reader:
    """Read an adapter's files from a URI that fsspec opens.

    Raises:
        AdapterNotFound: there is no filesystem for the URI.
    """
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
        except Exception as error:  # every storage backend has its own error classes
            raise AdapterNotFound(label, None, f"{uri!r} cannot be read: {error}") from error

    return read


def _read_file(label: str, path: Path) -> Bytes:
    try:
        content = allocate(path.stat().st_size)
        with path.open("rb", buffering=0) as stream:
            size = _read_fully(stream.readinto, content.data)
    except OSError as error:
        raise AdapterNotFound(label, None, f"{str(path)!r} cannot be read: {error}") from error
    return content[:size]


def _read_fully(readinto: Callable[[memoryview], int | None], target: memoryview) -> int:
    size = 0
    while size < len(target) and (read := readinto(target[size:])):
        size += read
    return size
