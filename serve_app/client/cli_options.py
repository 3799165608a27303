"""Arguments, options and exit codes that several commands of `hotswap` share."""

from __future__ import annotations

import os
from enum import IntEnum
from typing import Annotated, Any

import typer


class Exit(IntEnum):
    """Exit codes, next to 0 (done) and click's 2 (wrong usage)."""

    REFUSED = 1
    NOT_PROMOTED = 3
    UNREACHABLE = 4
    DEFECT = 70
    INTERRUPTED = 130


# plain help: a box around a usage error hides it from grep and breaks its line
PLAIN: Any = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}

Json = Annotated[bool, typer.Option("--json", help="Print only the JSON document.")]
Watch = Annotated[bool, typer.Option("--watch", help="Follow it to its end.")]
Generation = Annotated[
    int | None,
    typer.Option(help="Reject the request if the fleet has another generation (hotswap status)."),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key", help="Your key for this request; repeated, it changes nothing."
    ),
]


def adapter_source(adapter: str) -> str:
    """An existing local path as an absolute one, because the server runs in another directory."""
    path = os.path.expanduser(adapter)
    return os.path.abspath(path) if os.path.exists(path) else adapter
