"""Probes: functions that test a canary before it gets more traffic.

A plan names a function, `package.module:function`. It runs as a Ray task, with a client pinned to
the canary, one pinned to stable, and the plan's options; it returns a number for each score. Two
ready-made probes are at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import fsspec
from ray import serve

from serve_app.wire.errors import ProbeInvalid
from serve_app.wire.request_stats import PROBE
from serve_app.wire.text_score import TextScore

ProbeFunction = Callable[..., Mapping[str, float]]
_LOG_LIKELIHOOD = "serve_app.probes:log_likelihood"
_AGREEMENT = "serve_app.probes:agreement"
_AT_ONCE = 4  # requests of one probe; users' requests come first


class Client:
    """A client that is pinned to one revision. `revision`: in full, or `name@digest8`.

    Its requests are not counted in the request statistics, where they would distort those of the
    canary, which has few requests.
    """

    def __init__(self, app: str, revision: str, *, deployment: str = "Model") -> None:
        self.revision = revision
        self._handle = serve.get_deployment_handle(deployment, app)

    def chat(self, messages: Sequence[Mapping[str, str]], **parameters: Any) -> str:
        """The text of a chat answer. `parameters` are OpenAI's; greedy by default."""
        request = {"temperature": 0.0, "messages": list(messages)} | parameters
        document = self._handle.chat.remote(request, self.revision, PROBE).result()
        return str(document["choices"][0]["message"]["content"])

    def complete(self, prompt: str, **parameters: Any) -> str:
        """The text of a completion. `parameters` as for `chat`."""
        request = {"temperature": 0.0, "prompt": prompt} | parameters
        document = self._handle.complete.remote(request, self.revision, PROBE).result()
        return str(document["choices"][0]["text"])

    def classify(self, text: str) -> str:
        """The most likely label of a text; for classification models."""
        document = self._handle.classify.remote({"input": text}, self.revision, PROBE).result()
        return str(document["data"][0]["label"])

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """The log-likelihood of each text, given its first token."""
        found: list[TextScore] = []
        for first in range(0, len(texts), _AT_ONCE):
            some = list(texts[first : first + _AT_ONCE])
            found += self._handle.score.remote(some, self.revision).result()
        return found


def resolve(function: str) -> ProbeFunction:
    """The function that `package.module:function` names. Raises `ProbeInvalid`."""
    module, _, name = function.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # a module may raise anything
        raise ProbeInvalid(function, f"cannot be imported: {error}") from error
    if not callable(found):
        raise ProbeInvalid(function, "is not a function")
    return found  # type: ignore[no-any-return]


def check(functions: Sequence[str]) -> None:
    """Raises `ProbeInvalid` for the first function that does not exist; runs where probes run."""
    for function in functions:
        resolve(function)


def run(
    function: str, app: str, canary: str, stable: str, options: Mapping[str, Any]
) -> dict[str, float]:
    """The scores of one run, in a Ray task. Raises `ProbeInvalid`, and what the function raises."""
    given = resolve(function)(Client(app, canary), Client(app, stable), **options)
    try:
        return {str(name): float(value) for name, value in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ProbeInvalid(function, f"returned {given!r:.100} instead of scores") from error


# ---- probes that are ready to use ------------------------------------------------------------


def log_likelihood(canary: Client, stable: Client, *, file: str) -> dict[str, float]:
    """The mean log-probability (natural logarithm) of a token of held-out text.

    Args:
        file: any fsspec URI; one text a line.

    Returns:
        `canary`, `stable`, and `gain`: the canary's minus stable's.
    """
    texts = _lines(file, _LOG_LIKELIHOOD)
    ours, theirs = (_mean(client.score(texts)) for client in (canary, stable))
    return {"canary": ours, "stable": theirs, "gain": ours - theirs}


def agreement(
    canary: Client, stable: Client, *, file: str, max_tokens: int = 64
) -> dict[str, float]:
    """The share of golden answers that each revision gives; greedy, compared without outer spaces.

    Args:
        file: any fsspec URI; one JSON object a line: `answer`, and `prompt` (a text to continue) or
            `messages` (a chat).
        max_tokens: of an answer.

    Returns:
        `canary` and `stable`, shares from 0 to 1, and `gain`: the canary's minus stable's.
    """
    golden = [_case(line) for line in _lines(file, _AGREEMENT)]

    def right(client: Client, case: Mapping[str, Any]) -> bool:
        if "messages" in case:
            said = client.chat(case["messages"], max_tokens=max_tokens)
        else:
            said = client.complete(case["prompt"], max_tokens=max_tokens)
        return said.strip() == str(case["answer"]).strip()

    def share(client: Client) -> float:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return sum(pool.map(lambda case: right(client, case), golden)) / len(golden)

    ours, theirs = share(canary), share(stable)
    return {"canary": ours, "stable": theirs, "gain": ours - theirs}


def _lines(file: str, function: str) -> list[str]:
    """The non-empty lines. Raises `ProbeInvalid` if there are none."""
    with fsspec.open(file, "rt", encoding="utf-8") as lines:
        found = [text for line in lines if (text := line.strip())]
    if not found:
        raise ProbeInvalid(function, f"has no cases: {file} is empty")
    return found


def _case(line: str) -> dict[str, Any]:
    try:
        case = json.loads(line)
    except ValueError:
        case = None
    if isinstance(case, dict) and "answer" in case and ("messages" in case or "prompt" in case):
        return case
    raise ProbeInvalid(_AGREEMENT, f"needs an answer, and a prompt or messages: {line:.100}")


def _mean(scores: Iterable[TextScore]) -> float:
    known = list(scores)
    return sum(each.logprob for each in known) / sum(each.tokens for each in known)
