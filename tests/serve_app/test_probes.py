"""Probes: which function, what it is given, and the two that are ready to use."""

from __future__ import annotations

import json
import math
import pickle
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from serve_app.probes import Client, agreement, log_likelihood, resolve, run
from serve_app.wire.errors import ProbeInvalid
from serve_app.wire.request_stats import PROBE
from serve_app.wire.text_score import TextScore

HERE = __name__


# ---- a function of a user -----------------------------------------------------------------------


def scores_of(canary: Client, stable: Client, **options: Any) -> Mapping[Any, Any]:
    """What `returns` says; it sees who it was given."""
    return dict(options, canary=len(canary.revision), stable=len(stable.revision))


def returns(canary: Client, stable: Client, *, what: Any) -> Any:  # noqa: ARG001
    return what


def raises(canary: Client, stable: Client) -> Any:
    raise ArithmeticError(f"{canary.revision} {stable.revision}")


not_a_function = 5


class Handle:
    """Serve's handle, as far as a client uses it: remembers the calls, answers with `answers`."""

    def __init__(self, answers: Mapping[str, Any] | None = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers or {}

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Any:
            self.calls.append((method, args))
            answer = self._answers[method]
            found = answer(*args) if callable(answer) else answer
            return SimpleNamespace(result=lambda: found)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    chat = {"choices": [{"message": {"content": "said"}}]}
    made = Handle(
        {
            "chat": chat,
            "complete": {"choices": [{"text": "more"}]},
            "classify": {"data": [{"label": "good"}]},
            "score": lambda texts, _: [TextScore(-float(len(text)), 1) for text in texts],
        }
    )
    asked = []

    def get(deployment: str, app: str) -> Handle:
        asked.append((deployment, app))
        assert (deployment, app) == ("Model", "app")
        return made

    monkeypatch.setattr(serve, "get_deployment_handle", get)
    return made


def test_a_probe_is_named_by_its_module_and_its_function() -> None:
    assert resolve(f"{HERE}:raises") is raises
    assert resolve("serve_app.probes:log_likelihood") is log_likelihood


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("nowhere.at.all:f", "cannot be imported: No module named 'nowhere'"),
        (f"{HERE}:nothing", "cannot be imported: module"),
        (f"{HERE}:not_a_function", "is not a function"),
        (f"{HERE}", "cannot be imported"),
        (":f", "cannot be imported"),
        ("..relative:f", "cannot be imported"),
    ],
)
def test_a_probe_that_is_not_there_is_refused_with_its_name(function: str, why: str) -> None:
    with pytest.raises(ProbeInvalid) as refused:
        resolve(function)
    assert str(refused.value).startswith(f"the probe {function} {why}")
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


def test_a_module_that_breaks_when_it_is_imported_is_a_probe_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_written_probe.py").write_text("1 / 0\n")
    (tmp_path / "unreadable_probe.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for function in ("half_written_probe:f", "unreadable_probe:f"):
        with pytest.raises(ProbeInvalid, match="cannot be imported"):
            resolve(function)


def test_a_probe_gets_a_client_for_each_revision_and_the_options_of_the_plan(
    handle: Handle,
) -> None:
    found = run(f"{HERE}:scores_of", "app", "beta@1", "alpha@123", {"more": 7, "on": True})
    assert found == {"more": 7.0, "on": 1.0, "canary": 6.0, "stable": 9.0}
    assert {type(value) for value in found.values()} == {float}
    assert handle.calls == []


@pytest.mark.parametrize(
    "what", [None, 5, [1, 2], "gain", {"gain": "high"}, {"gain": None}, {"gain": [1]}]
)
def test_what_is_no_scores_is_refused_and_shown(handle: Handle, what: Any) -> None:
    with pytest.raises(ProbeInvalid, match="instead of scores") as refused:
        run(f"{HERE}:returns", "app", "b", "a", {"what": what})
    assert repr(what) in str(refused.value)
    assert handle.calls == []


def test_an_endless_answer_is_not_shown_in_full(handle: Handle) -> None:
    with pytest.raises(ProbeInvalid) as refused:
        run(f"{HERE}:returns", "app", "b", "a", {"what": "x" * 10_000})
    assert len(str(refused.value)) < 300
    assert handle.calls == []


def test_what_a_probe_raises_is_its_own(handle: Handle) -> None:
    with pytest.raises(ArithmeticError, match="beta alpha"):
        run(f"{HERE}:raises", "app", "beta", "alpha", {})
    with pytest.raises(TypeError, match="unexpected"):  # as an option that it does not know
        run(f"{HERE}:raises", "app", "beta", "alpha", {"unexpected": 1})
    assert handle.calls == []


# ---- a client -----------------------------------------------------------------------------------


def test_every_question_names_the_revision_and_is_not_counted(handle: Handle) -> None:
    client = Client("app", "beta@1")
    messages = [{"role": "user", "content": "hi"}]
    assert client.chat(messages) == "said"
    assert client.complete("once", max_tokens=3) == "more"
    assert client.classify("fine") == "good"
    assert handle.calls == [
        ("chat", ({"temperature": 0.0, "messages": messages}, "beta@1", PROBE)),
        ("complete", ({"temperature": 0.0, "prompt": "once", "max_tokens": 3}, "beta@1", PROBE)),
        ("classify", ({"input": "fine"}, "beta@1", PROBE)),
    ]


def test_a_question_is_greedy_unless_it_says_otherwise(handle: Handle) -> None:
    Client("app", "beta@1").complete("x", temperature=0.5, seed=3)
    [(_, (request, *_))] = handle.calls
    assert request == {"prompt": "x", "temperature": 0.5, "seed": 3}


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_texts_are_scored_a_few_at_a_time_and_in_their_order(handle: Handle, count: int) -> None:
    texts = ["x" * (number + 1) for number in range(count)]
    scores = Client("app", "beta@1").score(tuple(texts))
    assert [-score.logprob for score in scores] == [len(text) for text in texts]
    asked = [args for _, args in handle.calls]
    assert [text for some, _ in asked for text in some] == texts
    assert all(1 <= len(some) <= 4 and pin == "beta@1" for some, pin in asked)
    assert len(asked) == -(-count // 4)


# ---- ready to use -------------------------------------------------------------------------------


class FakeClient(Client):
    """Knows how likely texts are, and what to say; counts who asks at once."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known
        self.revision = "fake"
        self.asked: list[Any] = []
        self.parameters: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        self.asked += texts
        return [TextScore(*self.known[text]) for text in texts]

    def complete(self, prompt: str, **parameters: Any) -> str:
        with self.lock:
            self.asked.append(prompt)
            self.parameters.append(parameters)
        return str(self.known[prompt])

    def chat(self, messages: Sequence[Mapping[str, str]], **parameters: Any) -> str:
        return self.complete(messages[-1]["content"], **parameters)


def written(folder: Path, *lines: str) -> str:
    file = folder / "file"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def test_held_out_text_is_as_likely_as_its_mean_token(tmp_path: Path) -> None:
    file = written(tmp_path, "a b", "", "  été  ", "   ", "c")
    canary = FakeClient({"a b": (-2.0, 2), "été": (-1.0, 5), "c": (-3.0, 1)})
    stable = FakeClient({"a b": (-4.0, 2), "été": (-8.0, 5), "c": (-4.0, 1)})
    found = log_likelihood(canary, stable, file=file)
    assert found == {"canary": -0.75, "stable": -2.0, "gain": 1.25}
    assert canary.asked == stable.asked == ["a b", "été", "c"]


def test_the_text_may_be_anywhere(tmp_path: Path) -> None:
    file = Path(written(tmp_path, "a"))
    client = FakeClient({"a": (-2.0, 1)})
    assert log_likelihood(client, client, file=file.as_uri())["gain"] == 0
    with pytest.raises(FileNotFoundError):
        log_likelihood(client, client, file=str(tmp_path / "nowhere"))


def golden(folder: Path, *cases: Mapping[str, Any]) -> str:
    return written(folder, *(json.dumps(case) for case in cases), "")


def test_agreement_is_the_share_of_golden_answers(tmp_path: Path) -> None:
    file = golden(
        tmp_path,
        {"prompt": "one", "answer": "1"},
        {"prompt": "two", "answer": " 2\n"},
        {"messages": [{"role": "user", "content": "three"}], "answer": "3"},
        {"prompt": "four", "answer": 4},
    )
    canary = FakeClient({"one": " 1 ", "two": "2", "three": "3.", "four": "4"})
    stable = FakeClient({"one": "1", "two": "no", "three": "no", "four": "no"})
    found = agreement(canary, stable, file=file, max_tokens=7)
    assert found == {"canary": 0.75, "stable": 0.25, "gain": 0.5}
    assert sorted(canary.asked) == sorted(stable.asked) == ["four", "one", "three", "two"]
    assert canary.parameters == [{"max_tokens": 7}] * 4


@pytest.mark.parametrize("probe", [log_likelihood, agreement])
@pytest.mark.parametrize("lines", [(), ("", "  ", "")])
def test_a_file_with_nothing_in_it_is_no_probe(
    tmp_path: Path, probe: Any, lines: tuple[str, ...]
) -> None:
    client = FakeClient({})
    with pytest.raises(ProbeInvalid) as refused:
        probe(client, client, file=written(tmp_path, *lines))
    assert refused.value.function == f"serve_app.probes:{probe.__name__}"
    assert str(refused.value).endswith("file is empty")


@pytest.mark.parametrize(
    "line",
    ["not json", '["a list"]', '{"prompt": "no answer"}', '{"answer": "no question"}'],
)
def test_a_golden_line_that_asks_nothing_is_shown(tmp_path: Path, line: str) -> None:
    good = json.dumps({"prompt": "one", "answer": "1"})
    client = FakeClient({"one": "1"})
    with pytest.raises(ProbeInvalid, match="needs an answer") as refused:
        agreement(client, client, file=written(tmp_path, good, line))
    assert str(refused.value).endswith(line)
    assert client.asked == []


def test_a_revision_that_finds_a_text_impossible_fails_its_limits_and_nothing_else(
    tmp_path: Path,
) -> None:
    client = FakeClient({"a": (-9999.0, 1)})
    fine = FakeClient({"a": (-1.0, 1)})
    found = log_likelihood(client, fine, file=written(tmp_path, "a"))
    assert found["gain"] == -9998
    assert all(math.isfinite(value) for value in found.values())
