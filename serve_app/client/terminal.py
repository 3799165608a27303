"""A fleet in a terminal: its header, its replicas, its loaded adapters, its history.

Pure: views in, rich renderables out, so the command line, the demo and a test show the same.
`terminal_rollout` draws rollouts.
"""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from serve_app.client.terminal_rollout import paused_on_purpose, rollout_rows
from serve_app.client.terminal_text import (
    RevisionCell,
    duration,
    one_line,
    revision_style,
    revision_text,
    short_ids,
)
from serve_app.wire.admin import AdapterList, FleetView, ReplicaView, RolloutView

LOADED_SHOWN = 8


def fleet_screen(fleet: FleetView, rollout: RolloutView | None = None) -> RenderableType:
    """The fleet, with the given rollout or, without one, the fleet's current one."""
    rollout = rollout or fleet.rollout
    parts: list[RenderableType] = [_header(fleet, rollout)]
    if fleet.replicas:
        parts += [Text(), _replica_table(fleet, rollout)]
    notes = _notes(fleet, rollout)
    return Group(*parts, *([Text(), *notes] if notes else []))


def adapters_screen(adapters: AdapterList) -> RenderableType:
    """For each adapter a line: name, revision, replicas that serve it, source."""
    if not adapters.data:
        line = Text("no adapters are loaded", style="dim")
    else:
        width = max(len(each.lora_name) for each in adapters.data)
        line = Text("\n").join(
            Text.assemble(
                (f"{each.lora_name:<{width}}", "bold"),
                "  ",
                revision_text(each.revision),
                f"  {each.ready}/{each.total} serve it  ",
                (one_line(each.lora_path), "dim"),
            )
            for each in adapters.data
        )
    return Group(line, Text(f"generation {adapters.generation}", style="dim"))


def history_screen(fleet: FleetView) -> RenderableType:
    """The stable revisions, numbered, newest last."""
    if not fleet.history:
        return Text("no history yet", style="dim")
    width = len(str(len(fleet.history)))
    lines = [
        Text.assemble((f"{number:>{width}}  ", "dim"), revision_text(revision))
        for number, revision in enumerate(fleet.history, start=1)
    ]
    if fleet.history[-1] == fleet.stable:
        lines[-1].append("  stable", style="dim")
    return Group(*lines)


def _header(fleet: FleetView, rollout: RolloutView | None) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    serving = sum(replica.serving for replica in fleet.replicas)
    ready = (
        Text(f"{serving}/{len(fleet.replicas)} serving", style="green")
        if fleet.ready
        else Text("no replica serves", style="bold red")
    )
    place = f"epoch {fleet.epoch}, generation {fleet.generation}"
    grid.add_row(
        "stable", Text.assemble(revision_text(fleet.stable), "  ", ready, "  ", (place, "dim"))
    )
    if fleet.loaded:
        grid.add_row("loaded", _loaded(fleet))
    for heading, cell in rollout_rows(rollout) if rollout else ():
        grid.add_row(heading, cell)
    return grid


def _loaded(fleet: FleetView) -> Text:
    """The loaded adapters, each with a count where not every replica serves it."""
    serving = Counter(name for each in fleet.replicas for name in each.serves)
    parts = []
    for name in fleet.loaded[:LOADED_SHOWN]:
        part = revision_text(name)
        if serving[name] < len(fleet.replicas):
            part.append(f" {serving[name]}/{len(fleet.replicas)}", style="bold yellow")
        parts.append(part)
    if more := len(fleet.loaded) - len(parts):
        parts.append(Text(f"and {more} more", style="dim"))
    return Text("  ").join(parts)


def _replica_table(fleet: FleetView, rollout: RolloutView | None) -> RenderableType:
    # The box's own divider is the one blank between columns: 80 columns leave no room for more.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    table.add_column("replica", no_wrap=True)
    # Only these shrink in a narrow terminal, the widest first; a digest and its ellipsis fit.
    table.add_column("revision", min_width=10)
    table.add_column("assigned", min_width=8)
    table.add_column("staged", min_width=6)
    for heading in ("serving", "running", "re-\ncompiles", "last\nstage", "last\ncommit"):
        table.add_column(heading, no_wrap=True, justify="right")
    short = short_ids([replica.id for replica in fleet.replicas])
    for replica in fleet.replicas:
        cells = _replica_cells(replica, fleet=fleet, rollout=rollout)
        table.add_row(Text(short[replica.id]), *cells)
    return table


def _replica_cells(
    replica: ReplicaView, *, fleet: FleetView, rollout: RolloutView | None
) -> list[RenderableType]:
    swap = replica.last_swap
    return [
        RevisionCell(replica.revision) if replica.revision else Text("-", style="dim"),
        _role(replica.assigned, fleet=fleet, rollout=rollout),
        _role(replica.staged, fleet=fleet, rollout=rollout),
        Text("yes", style="green") if replica.serving else Text("no", style="bold yellow"),
        Text(str(replica.running)),
        Text(str(replica.recompiles), style="bold red" if replica.recompiles else ""),
        Text(duration(swap.stage_ms)) if swap else Text("-", style="dim"),
        Text(duration(swap.commit_us / 1000)) if swap else Text("-", style="dim"),
    ]


def _role(revision: str | None, *, fleet: FleetView, rollout: RolloutView | None) -> RenderableType:
    """`stable` or `target`, in that revision's colour; the header has their full names."""
    if revision is None:
        return Text("-", style="dim")
    if revision == fleet.stable:
        return Text("stable", style=revision_style(revision))
    if rollout and revision == rollout.target:
        return Text("target", style=revision_style(revision))
    return RevisionCell(revision)


def _notes(fleet: FleetView, rollout: RolloutView | None) -> list[RenderableType]:
    """Failures in red, then warnings in yellow, one line each."""
    short = short_ids([replica.id for replica in fleet.replicas])
    failures = [(short[each.id], each.failure) for each in fleet.replicas if each.failure]
    if rollout and rollout.reason and not paused_on_purpose(rollout):
        failures.insert(0, (f"rollout {rollout.id}", rollout.reason))
    eager = [
        f"{short[each.id]}: {each.limit_hits} frames fell back to eager since warm-up"
        for each in fleet.replicas
        if each.limit_hits
    ]
    lines = [Text(f"failure  {where}: {one_line(why)}", style="red") for where, why in failures]
    lines += [Text(f"warning  {one_line(why)}", style="yellow") for why in fleet.warnings + eager]
    return list(lines)
