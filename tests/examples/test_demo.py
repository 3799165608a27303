"""The demo's own checks: answers, mismatches, the result of a run, and the end of its processes.

`make demo` runs the demo itself.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
from rich.console import Console

from examples.demo_load import QUESTIONS, Answer, IncompleteAnswer, Load, read_answer
from examples.demo_reference import (
    Expected,
    Story,
    answers_table,
    mismatch,
    rollouts_table,
    summary,
)
from examples.demo_server import DemoFailed, Server, free_port
from serve_app.wire.admin import ReplicaView, RolloutView, SwapView

A, B = "a@11111111", "b@22222222"
QUESTION = QUESTIONS[0]
HEADERS = {"x-adapter-revision": A, "x-replica-id": "r1"}
EXPECTED = {
    (revision, QUESTION): Expected(prompt_ids=(1, 2), token_ids=ids, text=text)
    for revision, ids, text in ((A, (7, 8, 0), "arrr"), (B, (9, 0), "{}"))
}
RIGHT = Answer(
    question=QUESTION,
    revision=A,
    named=frozenset({A}),
    replica="r1",
    prompt_ids=(1, 2),
    token_ids=(7, 8, 0),
    text="arrr",
    streamed=False,
    began_at=10.0,
    ended_at=12.0,
)


def chunk(revision: str = A, **choice: Any) -> dict[str, Any]:
    return {"system_fingerprint": revision, "choices": [{"finish_reason": None} | choice]}


STREAM = [
    chunk(delta={"role": "assistant", "content": ""}),
    chunk(delta={"content": "ar"}, token_ids=[7]),
    chunk(delta={"content": "rr"}, token_ids=[8]),
    chunk(delta={}, token_ids=[0], finish_reason="stop"),
    {"system_fingerprint": A, "choices": []},
]


def read(*documents: dict[str, Any], streamed: bool = True) -> Answer:
    return read_answer(QUESTION, HEADERS, documents, streamed=streamed, began_at=10.0)


def swapped(replica: str, revision: str, **more: Any) -> ReplicaView:
    swap = SwapView(revision=revision, stage_ms=2.0, drain_ms=30.0, commit_us=400.0, copies=1)
    return ReplicaView(id=replica, revision=revision, assigned=revision, last_swap=swap, **more)


def rollout(target: str = B) -> RolloutView:
    return RolloutView(
        id="rollout-1",
        target=target,
        previous=A,
        strategy="rolling",
        max_unavailable=1,
        state="succeeded",
        created_at=11.0,
        ended_at=13.0,
        converge_ms=2000.0,
    )


def good_story() -> Story:
    return Story(
        answers=[RIGHT, replace(RIGHT, began_at=20.0, ended_at=21.0, streamed=True)],
        rollouts=[(rollout(), [swapped("r1", B), swapped("r2", B)])],
        compiled={"r1": 0, "r2": 0},
        complete=True,
    )


def wait_for(condition: Callable[[], bool], *, what: str, within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        time.sleep(0.02)


# ---- answers ------------------------------------------------------------------------------------


def test_a_stream_is_the_same_answer_as_a_document() -> None:
    message = {"role": "assistant", "content": "arrr"}
    whole = chunk(message=message, token_ids=[7, 8, 0], finish_reason="stop")
    document = read(whole | {"prompt_token_ids": [1, 2]}, streamed=False)
    stream = read(*STREAM)
    assert document.prompt_ids == (1, 2)
    assert (stream.token_ids, stream.text) == (document.token_ids, document.text)
    assert (stream.revision, stream.replica, stream.named) == (A, "r1", frozenset({A}))


def test_an_answer_without_an_end_is_a_failure() -> None:
    with pytest.raises(IncompleteAnswer):
        read(*STREAM[:3])
    with pytest.raises(IncompleteAnswer):
        read({"system_fingerprint": A, "choices": []})


def test_requests_to_a_closed_port_are_failures() -> None:
    load = Load(f"http://127.0.0.1:{free_port(0)}", clients=2)
    load.start()
    wait_for(lambda: len(load.failures) >= 2, what="two failed requests")
    load.stop()
    assert not load.answers


def test_answers_count_for_the_revision_and_the_time_they_began() -> None:
    load = Load("http://unused.test", clients=0)
    load.answers += [RIGHT, replace(RIGHT, replica="r2"), replace(RIGHT, revision=B)]
    load.answers.append(replace(RIGHT, began_at=9.0))
    assert load.answered_since(A, 10.0) == {"r1": 1, "r2": 1}


# ---- mismatches ---------------------------------------------------------------------------------


def test_the_right_answer_is_no_mismatch_with_and_without_its_prompt() -> None:
    assert mismatch(RIGHT, EXPECTED) is None
    assert mismatch(replace(RIGHT, prompt_ids=None, streamed=True), EXPECTED) is None


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"token_ids": (7, 8)}, "expected"),
        ({"text": "ahoy"}, "expected 'arrr'"),
        ({"token_ids": (9, 0), "text": "{}"}, "expected 'arrr'"),  # the other revision's answer
        ({"prompt_ids": (1, 3)}, "prompt"),
        ({"revision": "c@33333333", "named": frozenset({"c@33333333"})}, "never had this revision"),
        ({"named": frozenset({B})}, f"names {B}"),
        ({"named": frozenset({A, B})}, f"names {A}, {B}"),  # chunks that disagree
        ({"revision": "", "named": frozenset({"None"})}, "no revision"),
    ],
)
def test_any_difference_is_a_mismatch(wrong: dict[str, Any], why: str) -> None:
    assert why in (mismatch(replace(RIGHT, **wrong), EXPECTED) or "")


# ---- the result ---------------------------------------------------------------------------------


def test_the_last_line_is_one_json_object_with_the_documented_fields() -> None:
    line = json.dumps(summary(good_story()))
    assert "\n" not in line
    document = json.loads(line)
    assert document["ok"]
    assert (document["requests"], document["failed"], document["mismatched"]) == (2, 0, 0)
    assert document["recompiles"] == 0
    assert document["commit_us"] == [400.0, 400.0]
    assert document["stage_ms"] == [2.0, 2.0]
    assert document["converge_ms"] == [2000.0]
    assert document["answers"] == {A: 2}
    assert document["latency_during_rollouts_s"]["max"] == 2.0


@pytest.mark.parametrize(
    "fault",
    [
        {"failures": ["ReadTimeout: too slow"]},
        {"mismatches": ["another answer"]},
        {"compiled": {"r1": 1}},
        {"complete": False},
        {"answers": []},
        {"error": "the server ended"},
    ],
)
def test_one_fault_makes_a_run_bad(fault: dict[str, Any]) -> None:
    assert good_story().ok
    assert not replace(good_story(), **fault).ok


def test_failures_count_as_requests_and_are_in_the_last_line() -> None:
    document = summary(replace(good_story(), failures=["ReadTimeout: a", "ReadTimeout: a"]))
    assert (document["requests"], document["failed"]) == (4, 2)
    assert document["failures"] == {"ReadTimeout: a": 2}


def test_the_recompiles_of_a_replica_that_dies_still_count() -> None:
    story = Story()
    story.record([swapped("r1", A, recompiles=2, limit_hits=1), swapped("r2", A)])
    story.record([swapped("r2", A), swapped("r3", A)])
    assert story.recompiles == 3


def test_without_a_last_look_at_the_fleet_recompiles_are_unknown_not_zero() -> None:
    assert summary(Story())["recompiles"] is None


def test_a_swap_of_another_rollout_is_not_counted() -> None:
    story = replace(good_story(), rollouts=[(rollout(), [swapped("r1", A), swapped("r2", B)])])
    assert [replica.id for _, replica, _ in story.swaps()] == ["r2"]


def test_the_tables_show_every_revision_and_every_swap_in_80_columns() -> None:
    long = "terse_json@1af760a4"
    rolled = [(rollout(long), [swapped("r1", long), swapped("r2", long)])]
    story = replace(good_story(), rollouts=rolled)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(answers_table(story, EXPECTED), rollouts_table(story))
    shown = captured.get()
    assert all(part in shown for part in (A, "arrr", B, "{}"))
    assert all(part in shown for part in (long, "r1", "r2", "400", "2000"))


# ---- the server's processes ---------------------------------------------------------------------


def test_a_port_that_was_asked_for_and_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DemoFailed, match="taken"):
            free_port(taken.getsockname()[1])


def test_stop_ends_grandchildren_even_in_other_process_groups_and_without_sigint() -> None:
    without_sigint = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    )
    program = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {without_sigint!r}], process_group=0)\n"
        "print('up', flush=True)\n"
        "child.wait()\n"
    )
    server = Server(8000, patience_s={signal.SIGINT: 0.5, signal.SIGTERM: 10.0})
    server.launch([sys.executable, "-c", program])
    wait_for(lambda: "up" in server.tail(), what="the child process")
    pids = server.alive()
    assert len(pids) == 2
    server.stop()
    server.forget()
    assert not any(psutil.pid_exists(pid) and is_running(pid) for pid in pids)
    assert not server.folder.exists()


def is_running(pid: int) -> bool:
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
