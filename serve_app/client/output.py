"""What the command line puts out: documents, pictures that change, one line for an error.

Between `screen`, which draws, and the terminal or the file that a command's output goes to.
"""

from __future__ import annotations

from collections.abc import Iterable

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.live import Live


def complain(message: str, code: str) -> None:
    typer.echo(f"error: {' '.join(message.split())} [{code}]", err=True)


def show(document: BaseModel, picture: RenderableType, *, as_json: bool) -> None:
    if as_json:
        return typer.echo(document.model_dump_json(indent=2))
    console = Console()
    # one line stays one line for grep; tables fit themselves to the width either way
    console.print(picture, soft_wrap=not console.is_terminal)


def draw(frames: Iterable[RenderableType]) -> None:
    """One picture that changes in a terminal; elsewhere, each that differs from the last."""
    console = Console()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for frame in frames:
                live.update(frame, refresh=True)
        return
    told = ""
    for frame in frames:
        with console.capture() as captured:
            console.print(frame, soft_wrap=True)
        if captured.get() != told:
            told = captured.get()
            typer.echo(told, nl=False)
