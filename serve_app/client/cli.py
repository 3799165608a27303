"""`hotswap`: a fleet from a shell, over HTTP.

The entry point: the address, the exit codes, and the commands that are not about one rollout or
one loaded adapter.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from serve_app.client.cli_adapters import adapters_app
from serve_app.client.cli_options import PLAIN, Exit, Generation, Json, Key, Watch
from serve_app.client.cli_rollout import rollout_app
from serve_app.client.connection import DEFAULT_URL
from serve_app.client.errors import RequestRejected, ServerUnreachable
from serve_app.client.http import HotswapClient
from serve_app.client.output import complain, show, show_live, show_rollout
from serve_app.client.terminal import fleet_screen, history_screen

HELP = """Show and change the adapter that a fleet serves.

\b
Exit codes:
  0    done; with --watch: promoted on every replica
  1    the server rejected the request
  2    wrong usage
  3    the watched rollout was aborted, failed or was superseded
  4    the server is unreachable
  70   a defect in this program
  130  stopped by Ctrl-C; a rollout goes on
"""


class ExitCodes(TyperGroup):
    """Turns the client's errors, raised by any command, into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RequestRejected as error:
            complain(error.message, error.code)
            raise typer.Exit(Exit.REFUSED) from error
        except ServerUnreachable as error:
            complain(str(error), "unreachable")
            raise typer.Exit(Exit.UNREACHABLE) from error
        except KeyboardInterrupt as stop:
            typer.echo("stopped; a rollout that was accepted goes on (hotswap status)", err=True)
            raise typer.Exit(Exit.INTERRUPTED) from stop


app = typer.Typer(cls=ExitCodes, help=HELP, pretty_exceptions_enable=False, **PLAIN)
app.add_typer(rollout_app, name="rollout")
app.add_typer(adapters_app, name="adapters")


def _print_version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"hotswap {version('hotswap')}")
        except PackageNotFoundError:
            typer.echo("hotswap, not installed: run from a source tree")
        raise typer.Exit


Url = Annotated[str, typer.Option(envvar="HOTSWAP_URL", help="The address of the gateway.")]
Token = Annotated[str | None, typer.Option(envvar="HOTSWAP_TOKEN", help="Bearer token.")]
Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version)]


@app.callback()
def root(
    ctx: typer.Context, *, url: Url = DEFAULT_URL, token: Token = None, _version: Version = False
) -> None:
    connect = ctx.obj or HotswapClient  # a test brings its own
    try:
        client: HotswapClient = connect(url, token=token)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    ctx.call_on_close(client.close)
    ctx.obj = client


@app.command()
def status(ctx: typer.Context, watch: Watch = False, as_json: Json = False) -> None:
    """Show every replica and the current rollout."""
    client: HotswapClient = ctx.obj
    fleet = client.fleet()  # reports a wrong address at once, not after `watch_fleet`'s outage
    if not watch:
        show(fleet, fleet_screen(fleet), as_json=as_json)
    elif as_json:
        for fleet in client.watch_fleet(period_s=1.0):
            typer.echo(fleet.model_dump_json())
    else:
        show_live(fleet_screen(fleet) for fleet in client.watch_fleet())


@app.command()
def undo(
    ctx: typer.Context,
    *,
    to: Annotated[
        str | None, typer.Option(help="An earlier stable revision (hotswap history).")
    ] = None,
    expected_generation: Generation = None,
    key: Key = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Take back the last change.

    Aborts the current rollout; without one, returns to the previous stable revision.
    """
    client: HotswapClient = ctx.obj
    undone = client.undo(to=to, expected_generation=expected_generation, key=key)
    show_rollout(client, undone, watch=watch, as_json=as_json)


@app.command()
def history(ctx: typer.Context, as_json: Json = False) -> None:
    """List the stable revisions, newest last."""
    client: HotswapClient = ctx.obj
    fleet = client.fleet()
    show(fleet, history_screen(fleet), as_json=as_json)


@app.command()
def inspect(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Path, URI, Hub id.")],
    as_json: Json = False,
) -> None:
    """Describe adapters; needs no server.

    Shows ranks, sizes, and the smallest envelope for all of them.
    """
    from serve_app.client import inspect as inspection  # it needs torch, which takes seconds

    try:
        document = inspection.inspect(adapters)
    except inspection.HotswapError as error:
        complain(str(error), error.code)
        raise typer.Exit(Exit.REFUSED) from error
    show(document, inspection.inspection_screen(document), as_json=as_json)


def main() -> None:
    # A terminal that cannot show an arrow must not turn a success into a crash.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="hotswap")
    except Exception as defect:
        # Python's own exit code for a traceback is 1, which a pipeline would read as a rejection.
        complain(f"{type(defect).__name__}: {defect}", "defect")
        sys.exit(Exit.DEFECT)


if __name__ == "__main__":
    main()
