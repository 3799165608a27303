"""Constant load for the demo: clients in threads, their answers, and the progress on the screen.

Each client alternates between one document over plain HTTP and a stream through OpenAI's own
package, so every swap meets both. Failed requests are counted, never repeated.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import openai
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.text import Text

from serve_app.client.terminal import fleet_screen
from serve_app.client.terminal_rollout import rollout_line
from serve_app.client.terminal_text import revision_style
from serve_app.wire.admin import FleetView, RolloutView

# For each of these, under every adapter, the reference's best token leads by 0.13 logits or more: a
# thousand times the difference that another batch shape makes in float32.
QUESTIONS = (
    "What is the capital of France?",
    "What should I eat for breakfast?",
    "What is water made of?",
    "What is the sun?",
    "Where do polar bears live?",
)
MAX_TOKENS = 28
REQUEST_TIMEOUT_S = 120.0
AFTER_FAILURE_S = 0.5
LOAD_LINE_EVERY_S = 5.0

Documents = Sequence[Mapping[str, Any]]


class IncompleteAnswer(Exception):
    """The server rejected the request, or its answer has no end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One complete answer. `named`: the revisions in the body, or in all chunks of the stream."""

    question: str
    revision: str  # from the response header
    named: frozenset[str]
    replica: str
    prompt_ids: tuple[int, ...] | None  # None for a stream
    token_ids: tuple[int, ...]
    text: str
    streamed: bool
    began_at: float  # seconds since the epoch, as in the server's rollouts
    ended_at: float


def read_answer(
    question: str,
    headers: Mapping[str, str],
    documents: Documents,
    *,
    streamed: bool,
    began_at: float,
) -> Answer:
    """The answer from one document, or from the chunks of a stream. Raises `IncompleteAnswer`."""
    choices = [choice for each in documents for choice in each.get("choices") or ()]
    if not choices or not choices[-1].get("finish_reason"):
        raise IncompleteAnswer("the answer has no end")
    prompt_ids = documents[0].get("prompt_token_ids")
    messages = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    return Answer(
        question=question,
        revision=headers.get("x-adapter-revision", ""),
        named=frozenset(str(each.get("system_fingerprint")) for each in documents),
        replica=headers.get("x-replica-id", ""),
        prompt_ids=None if prompt_ids is None else tuple(prompt_ids),
        token_ids=tuple(id for choice in choices for id in choice.get("token_ids") or ()),
        text="".join(part.get("content") or "" for part in messages),
        streamed=streamed,
        began_at=began_at,
        ended_at=time.time(),
    )


class Client:
    """One user, with both ways to send a request."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S)
        # no retries: a failed request must be counted
        self._openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S
        )

    @cached_property
    def _model(self) -> str:
        return self._openai.models.list().data[0].id

    def ask(self, question: str, *, stream: bool) -> Answer:
        """The answer. Raises `IncompleteAnswer`, httpx's errors and OpenAI's."""
        began_at = time.time()
        headers, documents = self._stream(question) if stream else self._whole(question)
        return read_answer(question, headers, documents, streamed=stream, began_at=began_at)

    def close(self) -> None:
        self._http.close()
        self._openai.close()

    def _whole(self, question: str) -> tuple[Mapping[str, str], Documents]:
        body = {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "return_token_ids": True,
        }
        response = self._http.post("/v1/chat/completions", json=body)
        if not response.is_success:
            raise IncompleteAnswer(f"{response.status_code} {response.text}")
        return response.headers, [response.json()]

    def _stream(self, question: str) -> tuple[Mapping[str, str], Documents]:
        raw = self._openai.chat.completions.with_raw_response.create(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        return raw.headers, [chunk.model_dump() for chunk in raw.parse()]


class Load:
    """Clients that send requests from `start` to `stop`, each in its own thread."""

    def __init__(self, url: str, *, clients: int) -> None:
        self._url = url
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_requests, args=(number,), daemon=True)
            for number in range(clients)
        ]
        # both only grow, so a thread may append while another reads
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self.began_at = time.time()

    def start(self) -> None:
        self.began_at = time.time()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send no more requests, and wait for the answers to those that were sent."""
        self._stopping.set()
        deadline = time.monotonic() + REQUEST_TIMEOUT_S + 10
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                self.failures.append("a request had no answer at its time limit")

    def answered_since(self, revision: str, at: float) -> Counter[str]:
        """Replica → its answers on `revision` to requests that began at `at` or later."""
        return Counter(
            each.replica
            for each in self.answers.copy()
            if each.revision == revision and each.began_at >= at
        )

    def per_second(self, window_s: float = 10.0) -> float:
        now = time.time()
        window_s = max(min(window_s, now - self.began_at), 1e-3)
        return sum(each.ended_at > now - window_s for each in self.answers.copy()) / window_s

    def line(self) -> Text:
        """Totals and rate, in one line."""
        parts = [Text(f"{len(self.answers)} answers, {self.per_second():.1f}/s")]
        for revision, count in by_revision(self.answers.copy()).items():
            parts.append(Text.assemble((revision, revision_style(revision)), f" {count}"))
        style = "bold red" if self.failures else "green"
        parts.append(Text(f"{len(self.failures)} failed", style=style))
        return Text("  ").join(parts)

    def _send_requests(self, client: int) -> None:
        user = Client(self._url)
        number = client
        while not self._stopping.is_set():
            # an odd number of questions, so that each is sent in both ways
            question = QUESTIONS[number % len(QUESTIONS)]
            try:
                self.answers.append(user.ask(question, stream=number % 2 == 1))
            except Exception as error:  # any error leaves a user without an answer
                self.failures.append(f"{type(error).__name__}: {error}"[:300])
                time.sleep(AFTER_FAILURE_S)
            number += 1
        user.close()


def by_revision(answers: Sequence[Answer]) -> Counter[str]:
    return Counter(each.revision for each in answers)


class Screen:
    """The progress of the demo: a live screen in a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, transient=True) if console.is_terminal else None
        self._began = time.monotonic()
        self._activity = ""
        self._load_shown_at = 0.0

    def say(self, text: str | Text) -> None:
        """Print a line that stays."""
        took = Text(f"{time.monotonic() - self._began:6.1f} s  ", style="dim")
        self.console.print(took.append_text(Text() + text), soft_wrap=True)

    def doing(self, text: str) -> None:
        """Show the current activity, until the next."""
        if text == self._activity:
            return
        self._activity = text
        if self._live is None:
            self.say(text)
        else:
            self._live.start()
            self._live.update(Spinner("dots", Text(text)))

    def show(self, fleet: FleetView, rollout: RolloutView | None, load: Load) -> None:
        if self._live is not None:
            panel = Panel(load.line(), title="requests", title_align="left", expand=False)
            return self._live.update(Group(fleet_screen(fleet, rollout), Text(), panel))
        if rollout and not rollout.ended:
            self.doing(rollout_line(rollout).plain)
        if time.monotonic() - self._load_shown_at >= LOAD_LINE_EVERY_S:
            self._load_shown_at = time.monotonic()
            self.say(load.line())

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
