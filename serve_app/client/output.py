"""Output of the commands: JSON documents, text, live text in a terminal, and one-line errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.live import Live

from serve_app.client.cli_options import Exit
from serve_app.client.http import HotswapClient
from serve_app.client.terminal import fleet_screen
from serve_app.client.terminal_rollout import rollout_line
from serve_app.wire.admin import RolloutView


def complain(message: str, code: str) -> None:
    """One line on stderr, whatever line breaks are in the message."""
    typer.echo(f"error: {' '.join(message.split())} [{code}]", err=True)


def show(document: BaseModel, text: RenderableType, *, as_json: bool) -> None:
    if as_json:
        return typer.echo(document.model_dump_json(indent=2))
    console = Console()
    # one line stays one line for grep; tables fit themselves to the width either way
    console.print(text, soft_wrap=not console.is_terminal)


def show_live(frames: Iterable[RenderableType]) -> None:
    """In a terminal, each frame replaces the last; elsewhere, prints frames that differ from it."""
    console = Console()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for frame in frames:
                live.update(frame, refresh=True)
        return
    printed = ""
    for frame in frames:
        with console.capture() as captured:
            console.print(frame, soft_wrap=True)
        if captured.get() != printed:
            printed = captured.get()
            typer.echo(printed, nl=False)


def show_rollout(
    client: HotswapClient, rollout: RolloutView, *, watch: bool, as_json: bool
) -> None:
    """Print a rollout; with `watch`, follow it to its end, and exit with 3 if not promoted."""
    if watch:
        return _follow(client, rollout, as_json=as_json)
    show(rollout, rollout_line(rollout), as_json=as_json)
    if not as_json and not rollout.ended:
        typer.echo(f"watch: hotswap --url {client.base_url} rollout get {rollout.id} --watch")


def _follow(client: HotswapClient, rollout: RolloutView, *, as_json: bool) -> None:
    def frames() -> Iterator[RenderableType]:
        nonlocal rollout
        for now, fleet in client.watch(rollout.id):
            rollout = now
            yield fleet_screen(fleet, now) if Console().is_terminal else rollout_line(now)

    if as_json:  # one document on stdout: the ended rollout
        deque(frames(), maxlen=0)
        typer.echo(rollout.model_dump_json(indent=2))
    else:
        show_live(frames())
    if rollout.state != "succeeded":
        why = rollout.reason or "the server gave no reason"
        complain(f"{rollout.id} to {rollout.target} was not promoted: {why}", rollout.state)
        raise typer.Exit(Exit.NOT_PROMOTED)
