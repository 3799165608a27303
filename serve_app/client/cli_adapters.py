"""`hotswap adapters`: load, unload and list the adapters that requests name."""

from __future__ import annotations

from typing import Annotated

import typer

from serve_app.client.cli_options import PLAIN, Generation, Json, adapter_source
from serve_app.client.http import HotswapClient
from serve_app.client.output import show
from serve_app.client.terminal import adapters_screen
from serve_app.wire.admin import AdapterList, AdapterView

adapters_app = typer.Typer(help="Serve more adapters, for requests that name them.", **PLAIN)

Name = Annotated[str, typer.Argument(help="The adapter's name in requests.")]


@adapters_app.command()
def load(
    ctx: typer.Context,
    name: Name,
    path: Annotated[str, typer.Argument(help="A directory, or a source that the server resolves.")],
    *,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace the adapter that has this name.")
    ] = False,
    expected_generation: Generation = None,
    as_json: Json = False,
) -> None:
    """Load an adapter on every replica; returns when all serve it."""
    client: HotswapClient = ctx.obj
    loaded = client.load_adapter(
        name,
        adapter_source(path),
        load_inplace=in_place,
        expected_generation=expected_generation,
    )
    _show_adapter(loaded, as_json=as_json)


@adapters_app.command()
def unload(
    ctx: typer.Context, name: Name, *, expected_generation: Generation = None, as_json: Json = False
) -> None:
    """Unload an adapter; requests that run on it finish."""
    client: HotswapClient = ctx.obj
    unloaded = client.unload_adapter(name, expected_generation=expected_generation)
    _show_adapter(unloaded, as_json=as_json)


@adapters_app.command(name="list")
def list_adapters(ctx: typer.Context, as_json: Json = False) -> None:
    """List the loaded adapters, oldest first."""
    client: HotswapClient = ctx.obj
    adapters = client.adapters()
    show(adapters, adapters_screen(adapters), as_json=as_json)


def _show_adapter(adapter: AdapterView, *, as_json: bool) -> None:
    listed = AdapterList(data=[adapter], generation=adapter.generation)
    show(adapter, adapters_screen(listed), as_json=as_json)
