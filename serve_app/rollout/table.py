"""The transition table as documentation: a Mermaid diagram and a Markdown table of one source.

``python -m serve_app.rollout.table`` prints what stands between the marks in docs/rollouts.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from serve_app.rollout.state import TABLE, TRANSITIONS, State


def diagram() -> str:
    """A Mermaid state diagram."""
    return "\n".join(["```mermaid", "stateDiagram-v2", *_edges(), "```"])


def table() -> str:
    """A Markdown table, one line for each step that a rollout can take."""
    head = ["| from | to | when |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| {row.before} | {row.after} | {row.when} |" for row in TABLE)])


def _edges() -> Iterator[str]:
    yield f"    [*] --> {State.PENDING}"
    for row in TABLE:
        yield f"    {row.before} --> {row.after}"
    for state, after in TRANSITIONS.items():
        if not after:
            yield f"    {state} --> [*]"


if __name__ == "__main__":
    print(f"{diagram()}\n\n{table()}")
