"""What a replica compiled, shared: the second replica and every later one start without compiling.

Shared is inductor's cache folder, as one archive in `compile_cache_uri`. torch's own cache
artifacts would be smaller, but carry no compiled C++: on a CPU they save nothing (measured: 62 s of
warm-up with them, 59 s without, 23 s with the folder).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import tarfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import fsspec
import torch
from filelock import FileLock

from hotswap_lib import Slot
from serve_app.replica.embedded_model import cache_dir
from serve_app.settings import Settings

logger = logging.getLogger(__name__)
State = Literal["off", "hit", "miss"]
_PACKAGES = ("hotswap", "torch", "transformers", "peft")
_NOT_COMPILED = ("_name_or_path", "transformers_version")  # each node may keep it elsewhere


@dataclass(frozen=True, slots=True)
class CompileCache:
    """`state`: off without `compile_cache_uri`; hit: there was something to start from."""

    state: State
    folder: Path | None = None
    uri: str | None = None

    def publish(self) -> None:
        """After warm-up: share what was compiled here. Never fails; it is only a cache."""
        if self.state != "miss" or self.uri is None or self.folder is None:
            return
        try:
            fs, path = fsspec.url_to_fs(self.uri, skip_instance_cache=True)
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            archive = _pack(self.folder)
            with fs.transaction, fs.open(path, "wb") as file:  # whole, or not there
                file.write(archive)
            logger.info(f"shared {len(archive) / 1e6:.1f} MB of compiled code")
        except Exception as error:
            logger.warning(f"compiled code was not shared: {type(error).__name__}: {error}")


def open_compile_cache(slot: Slot, settings: Settings) -> CompileCache:
    """Before anything is compiled: have inductor work in a folder that starts with what others did.

    Whatever is wrong with the shared archive, the replica compiles for itself.
    """
    if settings.compile_cache_uri is None or not settings.compile:
        return CompileCache("off")
    name = _key(slot)
    folder = cache_dir() / "compiled" / name
    if " " in str(folder):  # inductor's calls of the C++ compiler do not quote
        logger.warning(f"compiled code is not shared: there is a space in {folder}")
        return CompileCache("off")
    uri = f"{settings.compile_cache_uri.rstrip('/')}/{name}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    # two replicas of a node start at the same time; one fetches for both
    with FileLock(f"{folder}.lock"):
        fetched = folder / ".fetched"
        if fetched.exists() or _fetch(uri, folder):
            fetched.touch()
            return CompileCache("hit", folder, uri)
    return CompileCache("miss", folder, uri)


def _fetch(uri: str, folder: Path) -> bool:
    try:
        fs, path = fsspec.url_to_fs(uri, skip_instance_cache=True)
        if not fs.exists(path):
            return False
        with tarfile.open(fileobj=io.BytesIO(fs.cat_file(path))) as archive:
            archive.extractall(folder, filter="data")
    except Exception as error:
        logger.warning(f"shared compiled code is not usable: {type(error).__name__}: {error}")
        return False
    return True


def _pack(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in sorted(folder.rglob("*")):
            # another replica of this node may be compiling in here: locks and halves are not for us
            if file.is_file() and file.suffix not in (".lock", ".tmp"):
                archive.add(file, arcname=str(file.relative_to(folder)))
    return buffer.getvalue()


def _key(slot: Slot) -> str:
    """Of everything that compiled code depends on and its own cache might not look at."""
    model = slot.model.base_model.model
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    facts: dict[str, Any] = {
        "packages": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "model": {name: value for name, value in config.items() if name not in _NOT_COMPILED},
        "dtype": str(model.dtype),
        "layout": slot.layout.fingerprint,
    }
    if model.device.type == "cuda":
        facts["device"] = [torch.cuda.get_device_name(), torch.version.cuda]
    else:
        # inductor's C++ is made for the number of threads as well
        facts["device"] = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
