"""The demo's expected answers and its result: the tables and the last line.

The reference is PEFT itself: a fresh `PeftModel.from_pretrained` for each revision, neither
prepared nor compiled, greedy `generate`. Every answer is compared. It has the tokens of the
reference for the revision that it names, or it is a mismatch.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from examples.demo_load import MAX_TOKENS, QUESTIONS, Answer, by_revision
from serve_app.client.terminal_text import revision_style, short_ids
from serve_app.wire.admin import ReplicaView, RolloutView, SwapView

EXAMPLES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The answer of plain PEFT: token ids include the end token, as in the server's answers."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str


References = Mapping[tuple[str, str], Expected]
"""(revision, question) → the expected answer; every question under each adapter."""


def references(base: Path, adapters: Sequence[Path]) -> Iterator[tuple[tuple[str, str], Expected]]:
    """The base model's answer to the first question, then each adapter's to all, one by one.

    Imports torch and loads the weights on the first one, so call this after the server has freed
    its cores and memory.
    """
    # raised inside transformers and peft about each other
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from hotswap_lib import BASE, load_adapter

    logging.disable_progress_bar()
    # Two threads are hardly faster on steps this small, and ten times slower when other programs
    # use the cores, because at every step each thread waits until the other is scheduled.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for adapter in (None, *adapters):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        revision = BASE
        if adapter is not None:
            revision = load_adapter(adapter).revision
            model = PeftModel.from_pretrained(model, str(adapter))
        model.eval().to(device)
        for question in QUESTIONS if adapter else QUESTIONS[:1]:
            yield (str(revision), question), _expected(model, tokenizer, question)


def _expected(model: Any, tokenizer: Any, question: str) -> Expected:
    import torch

    prompt_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    with torch.inference_mode():
        out_1T = model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
        )
    new = out_1T[0, len(prompt_ids) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Expected(prompt_ids=tuple(prompt_ids), token_ids=tuple(new), text=text)


def mismatch(answer: Answer, expected: References) -> str | None:
    """The difference between `answer` and the reference for its revision; None if they agree."""
    where = f"{answer.question!r} on {answer.revision or 'no revision'}, replica {answer.replica}"
    if answer.named != {answer.revision}:
        return f"{where}: the body names {', '.join(sorted(answer.named))}"
    right = expected.get((answer.revision, answer.question))
    if right is None:
        return f"{where}: the fleet never had this revision"
    if answer.prompt_ids is not None and answer.prompt_ids != right.prompt_ids:
        return f"{where}: the prompt has other tokens"
    # the text too: a stream decodes its tokens piece by piece
    if (answer.token_ids, answer.text) != (right.token_ids, right.text):
        return f"{where}: answered {answer.text!r}, expected {right.text!r}"
    return None


@dataclass(slots=True, kw_only=True)
class Story:
    """The record of one run of the demo; `complete` after the last look at the fleet."""

    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    rollouts: list[tuple[RolloutView, list[ReplicaView]]] = field(default_factory=list)
    compiled: dict[str, int] = field(default_factory=dict)  # replica → compilations after warm-up
    seconds: dict[str, float] = field(default_factory=dict)  # part of the run → its duration
    complete: bool = False
    error: str | None = None

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - began

    def record(self, replicas: Sequence[ReplicaView]) -> None:
        """Record compilations, so that those of a replica that dies later still count."""
        for each in replicas:
            count = each.recompiles + each.limit_hits
            self.compiled[each.id] = max(count, self.compiled.get(each.id, 0))

    def swaps(self) -> Iterator[tuple[RolloutView, ReplicaView, SwapView]]:
        for rollout, replicas in self.rollouts:
            for replica in replicas:
                swap = replica.last_swap
                if swap is not None and swap.revision == rollout.target:
                    yield rollout, replica, swap

    @property
    def recompiles(self) -> int:
        return sum(self.compiled.values())

    @property
    def ok(self) -> bool:
        bad = self.failures or self.mismatches or self.recompiles or self.error
        return self.complete and bool(self.answers) and not bad


def summary(story: Story) -> dict[str, Any]:
    """The demo's last line. Lists have one number for each rollout, or for each replica's swap."""
    swaps = list(story.swaps())
    during = [each for each in story.answers if _during_a_rollout(each, story)]
    document = {
        "ok": story.ok,
        "requests": len(story.answers) + len(story.failures),
        "failed": len(story.failures),
        "mismatched": len(story.mismatches),
        "recompiles": story.recompiles if story.complete else None,
        "commit_us": [round(swap.commit_us, 1) for _, _, swap in swaps],
        "stage_ms": [round(swap.stage_ms, 2) for _, _, swap in swaps],
        "drain_ms": [round(swap.drain_ms, 1) for _, _, swap in swaps],
        "copies": [swap.copies for _, _, swap in swaps],
        "converge_ms": [rollout.converge_ms for rollout, _ in story.rollouts],
        "rollouts": [f"{rollout.previous} -> {rollout.target}" for rollout, _ in story.rollouts],
        "streamed": sum(answer.streamed for answer in story.answers),
        "answers": dict(by_revision(story.answers)),
        "replicas_seen": len(story.compiled),
        "latency_s": _latency(story.answers),
        "latency_during_rollouts_s": _latency(during),
        "seconds": {part: round(took, 1) for part, took in story.seconds.items()},
        "failures": _counted(story.failures),
        "mismatches": _counted(story.mismatches),
    }
    return document | ({"error": story.error} if story.error else {})


def _during_a_rollout(answer: Answer, story: Story) -> bool:
    return any(
        answer.began_at < (rollout.ended_at or answer.ended_at)
        and answer.ended_at > rollout.created_at
        for rollout, _ in story.rollouts
    )


def _latency(answers: Sequence[Answer]) -> dict[str, float]:
    took = sorted(each.ended_at - each.began_at for each in answers)
    if not took:
        return {}
    at = {"p50": len(took) // 2, "p99": int(len(took) * 0.99), "max": len(took) - 1}
    return {name: round(took[index], 3) for name, index in at.items()}


def _counted(sentences: Sequence[str]) -> dict[str, int]:
    return dict(Counter(sentences).most_common(EXAMPLES_SHOWN))


def answers_table(story: Story, expected: References, question: str = QUESTIONS[0]) -> Table:
    """The answers to one question, by revision, in the order in which the fleet had them."""
    table = Table(title=question, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("revision", no_wrap=True)
    table.add_column("answer")
    for revision in (key[0] for key in expected if key[1] == question):
        answers = {
            each.text
            for each in story.answers
            if (each.revision, each.question) == (revision, question)
        }
        # the base model was never served; its answer is there for comparison
        text = "\n".join(sorted(answers)) or expected[revision, question].text
        style = revision_style(revision) if answers else "dim"
        table.add_row(Text(revision, style=style), Text(text, style="" if answers else "dim"))
    return table


def rollouts_table(story: Story) -> Table:
    """Every swap of every rollout, in at most 80 columns, the width of a pipe."""
    table = Table(title="rollouts", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("rollout", "target", "replica"):
        table.add_column(heading, no_wrap=True)
    for heading in ("stage\nms", "drain\nms", "commit\nµs", "copies", "converge\nms"):
        table.add_column(heading, no_wrap=True, justify="right")
    short = short_ids([replica.id for _, replica, _ in story.swaps()])
    for rollout, replica, swap in story.swaps():
        table.add_row(
            rollout.id,
            Text(rollout.target, style=revision_style(rollout.target)),
            short[replica.id],
            f"{swap.stage_ms:.1f}",
            f"{swap.drain_ms:.0f}",
            f"{swap.commit_us:.0f}",
            str(swap.copies),
            f"{rollout.converge_ms or 0:.0f}",
        )
    return table
