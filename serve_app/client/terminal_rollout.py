"""A rollout in a terminal: one line for logs and lists, and rows for the fleet's screen.

Pure: views in, rich renderables out.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from serve_app.client.terminal_text import duration, one_line, revision_text
from serve_app.wire.admin import CanaryView, RolloutList, RolloutView, VerdictView

STATE_STYLES = {"succeeded": "bold green", "aborting": "yellow", "aborted": "bold red"}
STATE_STYLES |= {"failed": "bold red", "superseded": "bold yellow"}
OUTCOME_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
# `CanaryView.pause` → why the rollout stays in its step
PAUSES = {
    "asked": "paused by request",
    "step": "waits to be promoted",
    "failure": "waits after a failure",
}


def rollout_line(rollout: RolloutView) -> Text:
    """One rollout in one line."""
    line = Text.assemble(
        (rollout.id, "bold"),
        "  ",
        _from_to(rollout),
        f"  {_strategy(rollout)}  ",
        _state(rollout),
        f"  {rollout.committed}/{rollout.total} committed, {rollout.staged}/{rollout.total} staged",
    )
    if rollout.converge_ms is not None and rollout.state == "succeeded":
        line.append(f"  in {duration(rollout.converge_ms)}")
    if rollout.canary is not None:
        line.append(f"  {'  '.join(_canary_words(rollout, rollout.canary))}")
        if (verdict := _newest_verdict(rollout.canary)) is not None:
            line.append("  ").append(_outcome(verdict.outcome))
    if rollout.reason:
        line.append(f"  ({one_line(rollout.reason)})")
    return line


def rollouts_screen(rollouts: RolloutList) -> RenderableType:
    if not rollouts.data:
        return Text("no rollouts yet", style="dim")
    return Group(*(rollout_line(rollout) for rollout in rollouts.data))


def rollout_rows(rollout: RolloutView) -> list[tuple[str, RenderableType]]:
    """(heading, cell) for each row of the fleet's header that is about its rollout."""
    rows: list[tuple[str, RenderableType]] = [
        ("rollout", Text.assemble((rollout.id, "bold"), "  ", _from_to(rollout))),
        ("", _progress(rollout)),
    ]
    if rollout.canary is not None:
        rows.append(("canary", Text("  ".join(_canary_words(rollout, rollout.canary)))))
        if (verdict := _newest_verdict(rollout.canary)) is not None:
            rows.append(("verdict", _verdict_text(verdict)))
    return rows


def paused_on_purpose(rollout: RolloutView) -> bool:
    """True if the rollout is paused by a user or by its plan, and not after a failure."""
    if rollout.state != "paused":
        return False
    return (
        rollout.reason == "paused" if rollout.canary is None else rollout.canary.pause != "failure"
    )


def _canary_words(rollout: RolloutView, canary: CanaryView) -> list[str]:
    """The step, the planned and the measured share of the requests, and the pause."""
    number, last = canary.step + 1, len(canary.steps)
    words = [f"step {number}/{last}" if number <= last else f"past step {last}/{last}"]
    if not rollout.ended:
        words.append(f"{canary.weight:g} %, {canary.placement}")
    counted = canary if canary.share is not None else _newest_verdict(canary)
    if counted is not None and counted.share is not None:
        words.append(f"{counted.share:.3g} % of {counted.requests} requests measured")
    if canary.pause is not None:
        words.append(PAUSES.get(canary.pause, canary.pause))
    return words


def _newest_verdict(canary: CanaryView) -> VerdictView | None:
    """The latest one even if the rollout has not acted on it yet."""
    return canary.latest or (canary.verdicts[-1] if canary.verdicts else None)


def _verdict_text(verdict: VerdictView) -> Text:
    """One line for each measurement, with its outcome."""
    lines = [
        Text.assemble(_outcome(each.outcome), "  ", one_line(each.why))
        for each in verdict.measurements
    ]
    return Text("\n").join(lines or [_outcome(verdict.outcome)])


def _outcome(outcome: str) -> Text:
    return Text(outcome, style=OUTCOME_STYLES.get(outcome, "bold"))


def _progress(rollout: RolloutView) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    # rich draws 0 of 0 as done; a rollout without replicas has an empty bar
    bar = ProgressBar(total=max(rollout.total, 1), completed=rollout.committed, width=16)
    count = Text(f"{rollout.committed}/{rollout.total} committed")
    if rollout.converge_ms is not None and rollout.state == "succeeded":
        count.append(f" in {duration(rollout.converge_ms)}")
    elif not rollout.ended:
        count.append(f", {rollout.staged}/{rollout.total} staged", style="dim")
    row.add_row(Text(_strategy(rollout), style="dim"), _state(rollout), bar, count)
    return row


def _from_to(rollout: RolloutView) -> Text:
    return Text.assemble(revision_text(rollout.previous), " → ", revision_text(rollout.target))


def _strategy(rollout: RolloutView) -> str:
    return f"{rollout.strategy}, {rollout.in_flight}" if rollout.in_flight else rollout.strategy


def _state(rollout: RolloutView) -> Text:
    return Text(rollout.state, style=STATE_STYLES.get(rollout.state, "bold"))
