"""Adapters on the Hugging Face Hub: one commit, then configuration and weights at that commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .errors import AdapterNotFound


def reader(
    label: str,
    repo_id: str,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    subfolder: str | None,
) -> Callable[[str], bytes | None]:
    """Reads files of one repository; the first answer pins the commit for those after it.

    A push between two downloads can therefore not mix two versions. Works from the cache alone
    under ``HF_HUB_OFFLINE=1``.

    Raises:
        AdapterNotFound: what was given is not a Hub id; later, the repository cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        rule = f"{repo_id!r} is no directory, no URI and no Hub id"
        raise AdapterNotFound(label, None, rule) from error
    pinned, at_commit = revision, False
    prefix = f"{subfolder}/" if subfolder else ""

    def read(file: str) -> bytes | None:
        nonlocal pinned, at_commit
        try:
            if file.endswith(".bin"):  # a pickle is never fetched, only noticed
                found = _exists(repo_id, f"{prefix}{file}", pinned, token, cache_dir)
                return b"" if found else None
            path = hf_hub_download(
                repo_id,
                file,
                subfolder=subfolder,
                revision=pinned,
                token=token,
                cache_dir=cache_dir,
            )
        except EntryNotFoundError as error:
            # not in the cache and the Hub is out of reach, which is not the same as absent, unless
            # this commit's other files are in the cache and nobody wants the Hub to be asked
            if isinstance(error, LocalEntryNotFoundError) and not (HF_HUB_OFFLINE and at_commit):
                raise AdapterNotFound(label, None, _unreachable(repo_id, error)) from error
            return None
        except Exception as error:  # httpx, requests, OSError: the client's choice changes
            raise AdapterNotFound(label, None, _unreachable(repo_id, error)) from error
        if commit := _commit_of(Path(path)):
            pinned, at_commit = commit, True
        return Path(path).read_bytes()

    return read


def _exists(
    repo_id: str,
    path: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> bool:
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    cached = try_to_load_from_cache(repo_id, path, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str) or HF_HUB_OFFLINE:
        return isinstance(cached, str)
    return file_exists(repo_id, path, revision=revision, token=token)


def _commit_of(path: Path) -> str | None:
    """The commit in a cached file's path: ``…/snapshots/<commit>/…``."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _unreachable(repo_id: str, error: Exception) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"Hub repository {repo_id!r} cannot be read: {first_line}"
