"""`hotswap`: the fleet from a shell, over HTTP.

Arguments, output and exit codes, over `client`, which asks, and `screen`, which draws.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from serve_app.client.http import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.client.output import complain, draw, show
from serve_app.client.terminal import (
    adapters_screen,
    fleet_screen,
    history_screen,
    rollout_line,
    rollouts_screen,
)
from serve_app.rollout.plan import InFlight, OnFailure, Placement, Plan, Strategy
from serve_app.wire.admin import AdapterList, AdapterView, RolloutView

HELP = """See and change which adapter a fleet serves.

\b
Exit codes:
  0    done; with --watch: promoted on every replica
  1    the server refused the request
  2    wrong usage
  3    the watched rollout was aborted, failed or was superseded
  4    the server is unreachable
  70   a defect in this program
  130  stopped by Ctrl-C; a rollout goes on
"""


class Exit(IntEnum):
    REFUSED = 1
    NOT_PROMOTED = 3
    UNREACHABLE = 4
    DEFECT = 70
    INTERRUPTED = 130


class ExitCodes(TyperGroup):
    """WeightLock the client's errors, from whichever command, into one line and an exit code."""

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


# plain help: a box around a usage error hides it from grep and breaks its line
PLAIN: Any = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}
app = typer.Typer(cls=ExitCodes, help=HELP, pretty_exceptions_enable=False, **PLAIN)
rollout_app = typer.Typer(help="Start, steer and see rollouts.", **PLAIN)
app.add_typer(rollout_app, name="rollout")
adapters_app = typer.Typer(help="Serve more adapters, for requests that name them.", **PLAIN)
app.add_typer(adapters_app, name="adapters")


def _print_version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"hotswap {version('hotswap')}")
        except PackageNotFoundError:
            typer.echo("hotswap, not installed: run from a source tree")
        raise typer.Exit


def _some_id(id: str) -> str:
    # `hotswap rollout abort "$ID"` with ID unset must not become another address
    if not id.strip():
        raise typer.BadParameter("the rollout's id is empty")
    return id


Url = Annotated[str, typer.Option(envvar="HOTSWAP_URL", help="The fleet's gateway.")]
Token = Annotated[str | None, typer.Option(envvar="HOTSWAP_TOKEN", help="Bearer token.")]
Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version)]
Json = Annotated[bool, typer.Option("--json", help="Print the document only.")]
Watch = Annotated[bool, typer.Option("--watch", help="Follow it to its end.")]
Name = Annotated[str, typer.Argument(help="What requests call it.")]
Generation = Annotated[
    int | None, typer.Option(help="Refuse if anything was decided since (hotswap status).")
]
Key = Annotated[
    str | None,
    typer.Option("--idempotency-key", help="Your name for this request; again changes nothing."),
]
Id = Annotated[str, typer.Argument(metavar="ID", callback=_some_id)]


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
    """Show the fleet: what every replica holds, and the rollout over it."""
    client: HotswapClient = ctx.obj
    fleet = client.fleet()  # a wrong address is told at once, not after an outage's wait
    if not watch:
        show(fleet, fleet_screen(fleet), as_json=as_json)
    elif as_json:
        for fleet in client.watch_fleet(period_s=1.0):
            typer.echo(fleet.model_dump_json())
    else:
        draw(fleet_screen(fleet) for fleet in client.watch_fleet())


@app.command()
def undo(
    ctx: typer.Context,
    *,
    to: Annotated[str | None, typer.Option(help="That earlier revision (hotswap history).")] = None,
    expected_generation: Generation = None,
    key: Key = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Abort what runs; else bring back the revision that was stable before."""
    client: HotswapClient = ctx.obj
    undone = client.undo(to=to, expected_generation=expected_generation, key=key)
    _follow(client, undone, watch=watch, as_json=as_json)


@app.command()
def history(ctx: typer.Context, as_json: Json = False) -> None:
    """List the revisions that were stable, newest last."""
    client: HotswapClient = ctx.obj
    fleet = client.fleet()
    show(fleet, history_screen(fleet), as_json=as_json)


@app.command()
def inspect(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Path, URI, Hub id.")],
    as_json: Json = False,
) -> None:
    """Look into adapters, here and without a server: ranks, size, the smallest envelope."""
    from serve_app.client import inspect as inspection  # it needs torch, which takes seconds

    try:
        document = inspection.inspect(adapters)
    except inspection.HotswapError as error:
        complain(str(error), error.code)
        raise typer.Exit(Exit.REFUSED) from error
    show(document, inspection.inspection_screen(document), as_json=as_json)


@rollout_app.command()
def start(
    ctx: typer.Context,
    *,
    plan: Annotated[
        str | None, typer.Option(help="A plan in YAML or JSON; other options go over it.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A directory, or what else the server resolves.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The revision's name.")] = None,
    strategy: Annotated[
        Strategy | None, typer.Option(help="In waves (the default), at once, or step by step.")
    ] = None,
    step: Annotated[
        list[str],
        typer.Option(metavar="WEIGHT[:HOLD]", help="Of a canary, such as 10:30s or 50:manual."),
    ] = [],  # noqa: B006  # typer copies it
    placement: Annotated[
        Placement | None, typer.Option(help="A canary beside stable, or on its own replicas.")
    ] = None,
    max_unavailable: Annotated[
        int | None, typer.Option(min=1, help="Out of service at once; 1 by default.")
    ] = None,
    in_flight: Annotated[
        InFlight | None,
        typer.Option(help="Wait for running requests, or let them finish beside the new ones."),
    ] = None,
    progress_deadline: Annotated[
        str | None, typer.Option(help="How long it may get no further, such as 10m.")
    ] = None,
    on_failure: Annotated[
        OnFailure | None, typer.Option(help="Go back (the default), or wait for you.")
    ] = None,
    expected_generation: Generation = None,
    key: Key = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Move the fleet to another adapter."""
    client: HotswapClient = ctx.obj
    options = {
        "adapter": adapter,
        "name": name,
        "strategy": strategy,
        "steps": [_step(each) for each in step] or None,
        "placement": placement,
        "max_unavailable": max_unavailable,
        "in_flight": in_flight,
        "progress_deadline": progress_deadline,
        "on_failure": on_failure,
    }
    given = {field: value for field, value in options.items() if value is not None}
    asked = _plan((_read_plan(plan) if plan else {}) | given)
    rollout = client.start(asked, expected_generation=expected_generation, key=key)
    _follow(client, rollout, watch=watch, as_json=as_json)


@rollout_app.command()
def get(ctx: typer.Context, id: Id, *, watch: Watch = False, as_json: Json = False) -> None:
    """Show one rollout."""
    client: HotswapClient = ctx.obj
    _follow(client, client.rollout(id), watch=watch, as_json=as_json)


@rollout_app.command(name="list")
def list_rollouts(ctx: typer.Context, as_json: Json = False) -> None:
    """List the rollouts, newest first."""
    client: HotswapClient = ctx.obj
    rollouts = client.rollouts()
    show(rollouts, rollouts_screen(rollouts), as_json=as_json)


@rollout_app.command()
def promote(
    ctx: typer.Context,
    id: Id,
    *,
    full: Annotated[bool, typer.Option("--full", help="Every step that is left.")] = False,
    expected_generation: Generation = None,
    key: Key = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Leave the current step now, whatever is measured."""
    client: HotswapClient = ctx.obj
    promoted = client.promote(id, full=full, expected_generation=expected_generation, key=key)
    _follow(client, promoted, watch=watch, as_json=as_json)


def _steering(verb: Callable[..., RolloutView], help: str) -> None:
    """A command for a verb of the client that takes a rollout's id and nothing of its own."""

    @rollout_app.command(name=verb.__name__, help=help)
    def steer(
        ctx: typer.Context,
        id: Id,
        *,
        expected_generation: Generation = None,
        key: Key = None,
        watch: Watch = False,
        as_json: Json = False,
    ) -> None:
        client: HotswapClient = ctx.obj
        steered = verb(client, id, expected_generation=expected_generation, key=key)
        _follow(client, steered, watch=watch, as_json=as_json)


_steering(HotswapClient.abort, "Send every replica back to the stable revision.")
_steering(HotswapClient.pause, "Stay in the current step; nobody else is sent to the target.")
_steering(HotswapClient.resume, "Go on after a pause.")
_steering(
    HotswapClient.retry,
    "Try again what failed: from its step when it is paused, from its start when it ended.",
)


@adapters_app.command()
def load(
    ctx: typer.Context,
    name: Name,
    path: Annotated[str, typer.Argument(help="A directory, or what else the server resolves.")],
    *,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace what has the name.")
    ] = False,
    expected_generation: Generation = None,
    as_json: Json = False,
) -> None:
    """Have every replica serve an adapter; done when all of them do."""
    client: HotswapClient = ctx.obj
    loaded = client.load_adapter(
        name,
        _source(path),
        load_inplace=in_place,
        expected_generation=expected_generation,
    )
    _show_adapter(loaded, as_json=as_json)


@adapters_app.command()
def unload(
    ctx: typer.Context, name: Name, *, expected_generation: Generation = None, as_json: Json = False
) -> None:
    """Serve an adapter no more; requests that run on it finish."""
    client: HotswapClient = ctx.obj
    unloaded = client.unload_adapter(name, expected_generation=expected_generation)
    _show_adapter(unloaded, as_json=as_json)


@adapters_app.command(name="list")
def list_adapters(ctx: typer.Context, as_json: Json = False) -> None:
    """List what is loaded, oldest first."""
    client: HotswapClient = ctx.obj
    adapters = client.adapters()
    show(adapters, adapters_screen(adapters), as_json=as_json)


def _read_plan(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as text:
            document = yaml.safe_load(text)  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise typer.BadParameter(f"the plan {file} cannot be read: {why}") from error
    if not isinstance(document, dict):
        raise typer.BadParameter(f"the plan {file} is no mapping of fields to values")
    return document


def _step(text: str) -> dict[str, object]:
    weight, colon, hold = text.partition(":")
    return {"weight": weight, **({"hold": hold} if colon else {})}


def _plan(fields: dict[str, Any]) -> Plan:
    try:
        plan = Plan.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "plan"
        why = first.get("ctx", {}).get("error") or first["msg"]
        raise typer.BadParameter(f"{where}: {why}") from error
    if plan.adapter == "base":  # no adapter
        return plan
    return plan.model_copy(update={"adapter": _source(plan.adapter)})


def _source(adapter: str) -> str:
    path = os.path.expanduser(adapter)
    # the server runs in another directory
    return os.path.abspath(path) if os.path.exists(path) else adapter


def _show_adapter(adapter: AdapterView, *, as_json: bool) -> None:
    listed = AdapterList(data=[adapter], generation=adapter.generation)
    show(adapter, adapters_screen(listed), as_json=as_json)


def _follow(client: HotswapClient, rollout: RolloutView, *, watch: bool, as_json: bool) -> None:
    """Show a rollout as it is, or follow it to its end and exit as it ended."""
    if not watch:
        show(rollout, rollout_line(rollout), as_json=as_json)
        if not as_json and not rollout.ended:
            typer.echo(f"watch: hotswap --url {client.base_url} rollout get {rollout.id} --watch")
        return

    def frames() -> Iterator[RenderableType]:
        nonlocal rollout
        for now, fleet in client.watch(rollout.id):
            rollout = now
            yield fleet_screen(fleet, now) if Console().is_terminal else rollout_line(now)

    if as_json:  # one document on stdout: the rollout as it ended
        deque(frames(), maxlen=0)
        typer.echo(rollout.model_dump_json(indent=2))
    else:
        draw(frames())
    if rollout.state != "succeeded":
        why = rollout.reason or "the server gave no reason"
        complain(f"{rollout.id} to {rollout.target} was not promoted: {why}", rollout.state)
        raise typer.Exit(Exit.NOT_PROMOTED)


def main() -> None:
    # A terminal that cannot show an arrow must not turn a success into a crash.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="hotswap")
    except Exception as defect:
        # Python's own exit code for a traceback is 1, which a pipeline would read as a refusal.
        complain(f"{type(defect).__name__}: {defect}", "defect")
        sys.exit(Exit.DEFECT)


if __name__ == "__main__":
    main()
