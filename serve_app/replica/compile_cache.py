"""Shares compiled code between replicas, so that later replicas start without compiling.

Inductor's cache folder is shared as one archive in `compile_cache_uri`. torch's own cache artifacts
would be smaller, but have no compiled C++: on a CPU they save nothing (measured: 62 s of warm-up
with them, 59 s without, 23 s with the folder).
"""

from __future__ import annotations

import copy
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
CacheState = Literal["off", "hit", "miss"]
_PACKAGES = ("hotswap", "torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class CompileCache:
    """The cache of one replica.

    `state`: "off" without `compile_cache_uri`; "hit" if another replica has shared its code.
    """

    state: CacheState
    folder: Path | None = None
    uri: str | None = None

    def publish(self) -> None:
        """Shares the code that warm-up compiled. Errors are logged: the replica works without."""
        if self.state != "miss" or self.uri is None or self.folder is None:
            return
        try:
            fs, path = fsspec.url_to_fs(self.uri, skip_instance_cache=True)
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            archive = _pack(self.folder)
            with fs.transaction, fs.open(path, "wb") as file:  # readers see all of it or nothing
                file.write(archive)
            logger.info(f"shared {len(archive) / 1e6:.1f} MB of compiled code at {self.uri}")
        except Exception as error:
            logger.warning(f"compiled code was not shared: {type(error).__name__}: {error}")


def open_compile_cache(slot: Slot, settings: Settings) -> CompileCache:
    """Gives inductor a cache folder that starts with the code that other replicas have shared.

    To be called before anything is compiled. With an unusable archive the replica compiles.
    """
    if settings.compile_cache_uri is None or not settings.compile:
        return CompileCache("off")
    name = _fingerprint(slot)
    folder = cache_dir() / "compiled" / name
    if " " in str(folder):  # inductor does not quote paths for the C++ compiler
        logger.warning(f"compiled code is not shared: there is a space in {folder}")
        return CompileCache("off")
    uri = f"{settings.compile_cache_uri.rstrip('/')}/{name}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    # replicas of a node start at the same time; the first one fetches for all
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
            # another replica of this node may be compiling: leave out locks and partial files
            if file.is_file() and file.suffix not in (".lock", ".tmp"):
                archive.add(file, arcname=str(file.relative_to(folder)))
    return buffer.getvalue()


def _fingerprint(slot: Slot) -> str:
    """Returns a hash of everything that compiled code depends on.

    Inductor's own cache keys may leave some of it out.
    """
    model = slot.model.get_base_model()
    facts: dict[str, Any] = {
        "packages": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "model": _config(model),
        "dtype": str(model.dtype),
        "layout": slot.layout.fingerprint,
    }
    if model.device.type == "cuda":
        facts["device"] = [torch.cuda.get_device_name(), torch.version.cuda]
    else:
        # inductor's C++ depends on the number of threads as well
        facts["device"] = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _config(model: Any) -> dict[str, Any]:
    """Returns the model's config without its folder, which differs between nodes."""
    config = copy.deepcopy(model.config)
    config.name_or_path = ""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return fields
