"""What a fleet looks like in a terminal: views in, rich renderables out.

Pure, so the CLI, the demo and a test draw the same picture. Text is never parsed as markup: names
and failures come from outside and may hold brackets.
"""

from __future__ import annotations

from collections import Counter
from zlib import crc32

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from serve_app.wire.admin import (
    AdapterList,
    CanaryView,
    FleetView,
    ReplicaView,
    RolloutList,
    RolloutView,
    VerdictView,
)

# Light enough for dark terminals, dark enough for light ones; red is left to failures.
PALETTE = ("cyan", "magenta", "green", "yellow", "blue", "orange3", "purple", "turquoise4")
STATE_STYLES = {"succeeded": "bold green", "aborting": "yellow", "aborted": "bold red"}
STATE_STYLES |= {"failed": "bold red", "superseded": "bold yellow"}
OUTCOME_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
WAITS = {
    "asked": "paused by request",
    "step": "waits to be promoted",
    "failure": "waits after a failure",
}
SHORT_ID = 6
SHOWN_BESIDE = 8


def revision_style(revision: str) -> str:
    """The same colour for the same text, in every process (`hash` is salted, a checksum is not)."""
    return PALETTE[crc32(revision.encode()) % len(PALETTE)]


class RevisionCell:
    """A revision that gives up its name before its digest when the column is narrow."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self.name, self.at, self.digest = revision.rpartition("@")

    def shortened(self, width: int) -> str:
        if len(self.revision) <= width:
            return self.revision
        tail = self.at + self.digest
        kept = width - len(tail) - 1
        if not self.at or kept < 0:
            return self.revision[: max(width - 1, 0)] + "…"
        return f"{self.name[:kept]}…{tail}"

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        least = len(self.at + self.digest) + 1 if self.at else 1
        return Measurement(min(least, len(self.revision)), len(self.revision))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.shortened(options.max_width), style=revision_style(self.revision))


def short_ids(ids: list[str]) -> dict[str, str]:
    """Each id as its last segment's first characters, as few as tell the ids apart."""
    tails = {id: id.rpartition("#")[2] or id for id in ids}
    longest = max((len(tail) for tail in tails.values()), default=0)
    for length in range(SHORT_ID, max(longest, SHORT_ID) + 1):
        short = {id: tail[:length] for id, tail in tails.items()}
        if len(set(short.values())) == len(short):
            return short
    return {id: id for id in ids}


def fleet_screen(fleet: FleetView, rollout: RolloutView | None = None) -> RenderableType:
    """The fleet, and the rollout over it: the one given, else the one that the fleet names."""
    rollout = rollout or fleet.rollout
    parts: list[RenderableType] = [_header(fleet, rollout)]
    if fleet.replicas:
        parts += [Text(), _replica_table(fleet, rollout)]
    notes = _notes(fleet, rollout)
    return Group(*parts, *([Text(), *notes] if notes else []))


def rollout_line(rollout: RolloutView) -> Text:
    """One rollout in one line, for logs and for lists."""
    line = Text.assemble(
        (rollout.id, "bold"),
        "  ",
        _way(rollout),
        f"  {rollout.strategy}{_in_flight(rollout)}  ",
        _state(rollout),
        f"  {rollout.committed}/{rollout.total} committed, {rollout.staged}/{rollout.total} staged",
    )
    if rollout.converge_ms is not None and rollout.state == "succeeded":
        line.append(f"  in {_ms(rollout.converge_ms)}")
    if rollout.canary is not None:
        line.append(f"  {'  '.join(_canary_words(rollout, rollout.canary))}")
        if (verdict := _verdict(rollout.canary)) is not None:
            line.append("  ").append(_outcome(verdict.outcome))
    if rollout.reason:
        line.append(f"  ({_one_line(rollout.reason)})")
    return line


def rollouts_screen(rollouts: RolloutList) -> RenderableType:
    if not rollouts.data:
        return Text("no rollouts yet", style="dim")
    return Group(*(rollout_line(rollout) for rollout in rollouts.data))


def adapters_screen(adapters: AdapterList) -> RenderableType:
    """One line for each: what it is called, what that is, who serves it, where it came from."""
    if not adapters.data:
        line = Text("no adapters are loaded", style="dim")
    else:
        width = max(len(each.lora_name) for each in adapters.data)
        line = Text("\n").join(
            Text.assemble(
                (f"{each.lora_name:<{width}}", "bold"),
                "  ",
                _revision(each.revision),
                f"  {each.ready}/{each.total} serve it  ",
                (_one_line(each.lora_path), "dim"),
            )
            for each in adapters.data
        )
    return Group(line, Text(f"generation {adapters.generation}", style="dim"))


def history_screen(fleet: FleetView) -> RenderableType:
    """The revisions that were stable, newest last, numbered as they came."""
    if not fleet.history:
        return Text("no history yet", style="dim")
    width = len(str(len(fleet.history)))
    lines = [
        Text.assemble((f"{number:>{width}}  ", "dim"), _revision(revision))
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
        "stable", Text.assemble(_revision(fleet.stable), "  ", ready, "  ", (place, "dim"))
    )
    if beside := _beside(fleet):
        grid.add_row("beside", beside)
    if rollout:
        grid.add_row("rollout", Text.assemble((rollout.id, "bold"), "  ", _way(rollout)))
        grid.add_row("", _progress(rollout))
        if rollout.canary is not None:
            grid.add_row("canary", Text("  ".join(_canary_words(rollout, rollout.canary))))
            if (verdict := _verdict(rollout.canary)) is not None:
                grid.add_row("verdict", _verdict_text(verdict))
    return grid


def _canary_words(rollout: RolloutView, canary: CanaryView) -> list[str]:
    """Where it is, the share of the requests that it shall have and has, what it waits for."""
    number, last = canary.step + 1, len(canary.steps)
    words = [f"step {number}/{last}" if number <= last else f"past step {last}/{last}"]
    if not rollout.ended:
        words.append(f"{canary.weight:g} %, {canary.placement}")
    counted = canary if canary.share is not None else _verdict(canary)
    if counted is not None and counted.share is not None:
        words.append(f"{counted.share:.3g} % of {counted.requests} requests measured")
    if canary.pause is not None:
        words.append(WAITS.get(canary.pause, canary.pause))
    return words


def _verdict(canary: CanaryView) -> VerdictView | None:
    """The newest one, whether anything has followed from it or not."""
    return canary.latest or (canary.verdicts[-1] if canary.verdicts else None)


def _verdict_text(verdict: VerdictView) -> Text:
    """What was looked at, line by line, each with its own outcome."""
    lines = [
        Text.assemble(_outcome(each.outcome), "  ", _one_line(each.why))
        for each in verdict.measurements
    ]
    return Text("\n").join(lines or [_outcome(verdict.outcome)])


def _outcome(outcome: str) -> Text:
    return Text(outcome, style=OUTCOME_STYLES.get(outcome, "bold"))


def _beside(fleet: FleetView) -> Text | None:
    """What is served for requests that name it, and by how many replicas where not by all."""
    if not fleet.loaded:
        return None
    serving = Counter(name for each in fleet.replicas for name in each.serves)
    parts = []
    for name in fleet.loaded[:SHOWN_BESIDE]:
        part = _revision(name)
        if serving[name] < len(fleet.replicas):
            part.append(f" {serving[name]}/{len(fleet.replicas)}", style="bold yellow")
        parts.append(part)
    if more := len(fleet.loaded) - len(parts):
        parts.append(Text(f"and {more} more", style="dim"))
    return Text("  ").join(parts)


def _progress(rollout: RolloutView) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    # A bar over nobody is empty, not full: rich draws 0 of 0 as done.
    bar = ProgressBar(total=max(rollout.total, 1), completed=rollout.committed, width=16)
    count = Text(f"{rollout.committed}/{rollout.total} committed")
    if rollout.converge_ms is not None and rollout.state == "succeeded":
        count.append(f" in {_ms(rollout.converge_ms)}")
    elif not rollout.ended:
        count.append(f", {rollout.staged}/{rollout.total} staged", style="dim")
    row.add_row(
        Text(f"{rollout.strategy}{_in_flight(rollout)}", style="dim"), _state(rollout), bar, count
    )
    return row


def _replica_table(fleet: FleetView, rollout: RolloutView | None) -> RenderableType:
    # The box's own divider is the one blank between columns: 80 columns leave no room for more.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    table.add_column("replica", no_wrap=True)
    # Only these give way when it is narrow, the widest first; a digest and its ellipsis stay.
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
        Text(_ms(swap.stage_ms)) if swap else Text("-", style="dim"),
        Text(_ms(swap.commit_us / 1000)) if swap else Text("-", style="dim"),
    ]


def _role(revision: str | None, *, fleet: FleetView, rollout: RolloutView | None) -> RenderableType:
    """The header has the full names, so a cell says which of them it is, in that one's colour."""
    if revision is None:
        return Text("-", style="dim")
    if revision == fleet.stable:
        return Text("stable", style=revision_style(revision))
    if rollout and revision == rollout.target:
        return Text("target", style=revision_style(revision))
    return RevisionCell(revision)


def _notes(fleet: FleetView, rollout: RolloutView | None) -> list[RenderableType]:
    short = short_ids([replica.id for replica in fleet.replicas])
    failures = [(short[each.id], each.failure) for each in fleet.replicas if each.failure]
    if rollout and rollout.reason and not _waits(rollout):
        failures.insert(0, (f"rollout {rollout.id}", rollout.reason))
    eager = [
        f"{short[each.id]}: {each.limit_hits} frames fell back to eager since warm-up"
        for each in fleet.replicas
        if each.limit_hits
    ]
    lines = [Text(f"failure  {who}: {_one_line(why)}", style="red") for who, why in failures]
    lines += [Text(f"warning  {_one_line(why)}", style="yellow") for why in fleet.warnings + eager]
    return list(lines)


def _waits(rollout: RolloutView) -> bool:
    """Whether it stands still because somebody wanted it to, which is no failure."""
    if rollout.state != "paused":
        return False
    return (
        rollout.reason == "paused" if rollout.canary is None else rollout.canary.pause != "failure"
    )


def _revision(revision: str) -> Text:
    return Text(revision, style=revision_style(revision))


def _way(rollout: RolloutView) -> Text:
    return Text.assemble(_revision(rollout.previous), " → ", _revision(rollout.target))


def _in_flight(rollout: RolloutView) -> str:
    return f", {rollout.in_flight}" if rollout.in_flight else ""


def _state(rollout: RolloutView) -> Text:
    return Text(rollout.state, style=STATE_STYLES.get(rollout.state, "bold"))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _ms(ms: float) -> str:
    if ms < 1:
        return f"{ms * 1000:.0f} µs"
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"
