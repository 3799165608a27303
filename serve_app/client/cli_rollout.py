"""`hotswap rollout`: start a rollout, change its course, show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from serve_app.client.cli_options import PLAIN, Generation, Json, Key, Watch, adapter_source
from serve_app.client.http import HotswapClient
from serve_app.client.output import show, show_rollout
from serve_app.client.terminal_rollout import rollouts_screen
from serve_app.rollout.plan import InFlight, OnFailure, Placement, Plan, Strategy
from serve_app.wire.admin import RolloutView

rollout_app = typer.Typer(help="Start, control and show rollouts.", **PLAIN)


def _checked_id(id: str) -> str:
    # `hotswap rollout abort "$ID"` with ID unset must not become another address
    if not id.strip():
        raise typer.BadParameter("the rollout's id is empty")
    return id


Id = Annotated[str, typer.Argument(metavar="ID", callback=_checked_id)]


@rollout_app.command(help="Move the fleet to another adapter.")
def start(
    ctx: typer.Context,
    *,
    plan: Annotated[
        str | None, typer.Option(help="A plan in YAML or JSON; the other options override it.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A directory, or a source that the server resolves.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The revision's name.")] = None,
    strategy: Annotated[
        Strategy | None, typer.Option(help="At once, in waves (the default), or step by step.")
    ] = None,
    step: Annotated[
        list[str],
        typer.Option(metavar="WEIGHT[:HOLD]", help="A canary step: 10:30s or 50:manual."),
    ] = [],  # noqa: B006  # typer copies it
    placement: Annotated[
        Placement | None,
        typer.Option(help="The canary on replicas of its own, or on every replica."),
    ] = None,
    max_unavailable: Annotated[
        int | None, typer.Option(min=1, help="Replicas out of service at once; 1 by default.")
    ] = None,
    in_flight: Annotated[
        InFlight | None,
        typer.Option(help="Finish running requests before the swap, or on the old revision."),
    ] = None,
    progress_deadline: Annotated[
        str | None, typer.Option(help="Fail after this long without progress: 10m.")
    ] = None,
    on_failure: Annotated[
        OnFailure | None, typer.Option(help="Roll back (the default), or pause.")
    ] = None,
    expected_generation: Generation = None,
    key: Key = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Start a rollout. Longer than 40 lines because its parameters are the command's options."""
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
    checked = _plan((_read_plan(plan) if plan else {}) | given)
    rollout = client.start(checked, expected_generation=expected_generation, key=key)
    show_rollout(client, rollout, watch=watch, as_json=as_json)


@rollout_app.command()
def get(ctx: typer.Context, id: Id, *, watch: Watch = False, as_json: Json = False) -> None:
    """Show one rollout."""
    client: HotswapClient = ctx.obj
    show_rollout(client, client.rollout(id), watch=watch, as_json=as_json)


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
    full: Annotated[bool, typer.Option("--full", help="End every remaining step.")] = False,
    expected_generation: Generation = None,
    key: Key = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """End the current step now, without its analysis."""
    client: HotswapClient = ctx.obj
    promoted = client.promote(id, full=full, expected_generation=expected_generation, key=key)
    show_rollout(client, promoted, watch=watch, as_json=as_json)


def _add_verb(verb: Callable[..., RolloutView], help: str) -> None:
    """Adds a command for a method of the client that takes a rollout's id and a precondition."""

    @rollout_app.command(name=verb.__name__, help=help)
    def run(
        ctx: typer.Context,
        id: Id,
        *,
        expected_generation: Generation = None,
        key: Key = None,
        watch: Watch = False,
        as_json: Json = False,
    ) -> None:
        client: HotswapClient = ctx.obj
        rollout = verb(client, id, expected_generation=expected_generation, key=key)
        show_rollout(client, rollout, watch=watch, as_json=as_json)


_add_verb(HotswapClient.abort, "Send every replica back to the stable revision.")
_add_verb(HotswapClient.pause, "Stay in the current step; no more replicas go to the target.")
_add_verb(HotswapClient.resume, "Continue after a pause.")
_add_verb(
    HotswapClient.retry,
    "Repeat what failed: the step of a paused rollout, or a whole ended rollout.",
)


def _read_plan(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as text:
            document = yaml.safe_load(text)  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise typer.BadParameter(f"the plan {file} cannot be read: {why}") from error
    if not isinstance(document, dict):
        raise typer.BadParameter(f"the plan {file} is not a mapping of fields to values")
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
    if plan.adapter == "base":  # no adapter, even if a folder has this name
        return plan
    return plan.model_copy(update={"adapter": adapter_source(plan.adapter)})
