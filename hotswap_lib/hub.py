"""Adapters on the Hugging Face Hub: one snapshot, at one commit, of two files.

``snapshot_download`` resolves the revision once, so a push between two downloads cannot mix two
versions. Under ``HF_HUB_OFFLINE=1`` it uses the cache alone. `has_file` is separate because a
pickle must be noticed and never downloaded.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import AdapterNotFound


def download(
    label: str,
    repo_id: str,
    *,
    files: Sequence[str],
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Path:
    """The folder of one commit, with those of the files that the repository has.

    Args:
        label: the adapter's name in errors.
        files: paths inside the repository.
        revision: branch, tag or commit; None for the default branch.

    Raises:
        AdapterNotFound: the id is invalid, or the repository cannot be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class NoBar(tqdm):
        """`snapshot_download` shows a progress bar even for files in the cache."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=[glob.escape(file) for file in files],
                token=token,
                cache_dir=cache_dir,
                tqdm_class=NoBar,
            )
        )
    except HFValidationError as error:
        rule = f"{repo_id!r} is not a directory, a URI or a Hub id"
        raise AdapterNotFound(label, None, rule) from error
    except Exception as error:  # httpx, OSError, ...: the classes differ between versions
        raise AdapterNotFound(label, None, _unreadable(repo_id, error)) from error


def has_file(
    label: str, repo_id: str, snapshot: Path, file: str, *, token: str | bool | None
) -> bool:
    """True if the commit of a snapshot has this file. The file is not downloaded.

    Args:
        snapshot: the folder from `download`.

    Raises:
        AdapterNotFound: the repository cannot be read.
    """
    from huggingface_hub import file_exists
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if (snapshot / file).is_file() or HF_HUB_OFFLINE:
        return (snapshot / file).is_file()
    try:
        # the folder's name is the commit
        return bool(file_exists(repo_id, file, revision=snapshot.name, token=token))
    except Exception as error:
        raise AdapterNotFound(label, None, _unreadable(repo_id, error)) from error


def _unreadable(repo_id: str, error: Exception) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"Hub repository {repo_id!r} cannot be read: {first_line}"
