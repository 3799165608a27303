"""The weight lock: one step at a time, first come first served, each on its own revision."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hotswap_lib import BASE, AdapterImage, Revision, Slot
from hotswap_lib.errors import VerifyFailed
from serve_app.engine.weight_lock import FairLock, WeightLock
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.conftest import new_slot
from tests.serve_app.fakes import NEVER_S


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + NEVER_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {NEVER_S:g} s until {what}"
        time.sleep(0.0005)


@pytest.fixture
def threads() -> Iterator[list[threading.Thread]]:
    started: list[threading.Thread] = []
    yield started
    for thread in started:
        thread.join(NEVER_S)
        assert not thread.is_alive(), f"a thread did not end within {NEVER_S:g} s"


def start(threads: list[threading.Thread], work: Callable[[], object]) -> None:
    threads.append(threading.Thread(target=work, daemon=True))
    threads[-1].start()


# ---- the lock -----------------------------------------------------------------------------------


def test_the_lock_goes_to_the_thread_that_has_waited_longest(
    threads: list[threading.Thread],
) -> None:
    lock, order = FairLock(), list[int]()

    def work(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        for number in range(8):
            start(threads, lambda number=number: work(number))  # type: ignore[misc]
            until(lambda number=number: lock.waiting == number + 1, "it waits")  # type: ignore[misc]
    until(lambda: len(order) == 8, "each thread had the lock")
    assert order == list(range(8))


def test_a_thread_that_comes_back_at_once_waits_behind_the_others(
    threads: list[threading.Thread],
) -> None:
    lock, order, rounds = FairLock(), list[str](), 50

    def work(name: str) -> None:
        for _ in range(rounds):
            with lock:
                order.append(name)
                until(
                    lambda: lock.waiting > 0 or order.count("ab".strip(name)) == rounds,
                    "the other thread waits",
                )

    for name in "ab":
        start(threads, lambda name=name: work(name))  # type: ignore[misc]
    until(lambda: len(order) == 2 * rounds, "both threads are through")
    assert "".join(order) in ("ab" * rounds, "ba" * rounds)


def test_two_threads_never_hold_the_lock_at_once(threads: list[threading.Thread]) -> None:
    lock, inside, most, rounds = FairLock(), list[int](), list[int](), 300

    def work() -> None:
        for _ in range(rounds):
            with lock:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    for _ in range(6):
        start(threads, work)
    until(lambda: len(most) == 6 * rounds, "all threads are through")
    assert set(most) == {1}


def test_the_lock_is_given_back_when_what_it_guards_fails() -> None:
    lock = FairLock()
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    with lock:
        pass


# ---- steps --------------------------------------------------------------------------------------


@pytest.fixture
def slot(world: TinyWorld) -> Slot:
    return new_slot(world)


@pytest.fixture
def weight_lock(slot: Slot, images: dict[str, AdapterImage]) -> WeightLock:
    weight_lock = WeightLock(slot)
    for name in ("alpha", "beta"):
        weight_lock.add(slot.stage(images[name]))
    return weight_lock


@pytest.fixture
def alpha(images: dict[str, AdapterImage]) -> Revision:
    return images["alpha"].revision


@pytest.fixture
def beta(images: dict[str, AdapterImage]) -> Revision:
    return images["beta"].revision


def test_a_step_has_its_revision_in_the_weights(
    weight_lock: WeightLock, alpha: Revision, beta: Revision
) -> None:
    for revision in (alpha, beta, BASE, beta):
        with weight_lock.on(revision):
            assert weight_lock.slot.revision == revision
            weight_lock.slot.verify()


def test_only_a_step_on_another_revision_writes_the_weights(
    weight_lock: WeightLock, alpha: Revision, beta: Revision
) -> None:
    counts = []
    for revision in (BASE, alpha, alpha, beta, beta, alpha):
        with weight_lock.on(revision):
            counts.append(weight_lock.commits)
    assert counts == [0, 1, 1, 2, 2, 3]


def test_steps_of_many_threads_never_see_each_others_weights(
    weight_lock: WeightLock, alpha: Revision, beta: Revision, threads: list[threading.Thread]
) -> None:
    wrong, done = list[Revision](), list[int]()

    def work(revision: Revision) -> None:
        for _ in range(20):
            with weight_lock.on(revision):
                if weight_lock.slot.revision != revision:
                    wrong.append(revision)
                weight_lock.slot.verify()
        done.append(1)

    for revision in (alpha, beta, BASE):
        start(threads, lambda revision=revision: work(revision))  # type: ignore[misc]
    until(lambda: len(done) == 3, "all threads are through")
    assert wrong == []


def test_no_step_runs_on_a_revision_that_was_dropped(
    weight_lock: WeightLock, alpha: Revision, beta: Revision
) -> None:
    weight_lock.drop(alpha)
    weight_lock.drop(alpha)
    with pytest.raises(KeyError), weight_lock.on(alpha):
        pass
    with weight_lock.on(beta):
        assert weight_lock.slot.revision == beta


def test_a_verified_commit_leaves_its_revision_in_the_weights(
    weight_lock: WeightLock, alpha: Revision
) -> None:
    receipt, verify_s = weight_lock.commit_and_verify(alpha)
    assert (receipt.revision, receipt.previous, verify_s > 0) == (alpha, BASE, True)
    assert weight_lock.slot.revision == alpha


@pytest.mark.parametrize("dropped", [False, True])
def test_a_failed_verification_leaves_what_was_in_the_weights_before(
    weight_lock: WeightLock,
    alpha: Revision,
    beta: Revision,
    monkeypatch: pytest.MonkeyPatch,
    dropped: bool,
) -> None:
    with weight_lock.on(alpha):
        pass
    if dropped:  # after its last step
        weight_lock.drop(alpha)

    def fails() -> None:
        raise VerifyFailed(str(weight_lock.slot.revision), "a tensor", "it differs")

    with monkeypatch.context() as patch:
        patch.setattr(weight_lock.slot, "verify", fails)
        with pytest.raises(VerifyFailed, match="beta"):
            weight_lock.commit_and_verify(beta)
    assert weight_lock.slot.revision == alpha
    weight_lock.slot.verify()
    with weight_lock.on(beta):
        assert weight_lock.slot.revision == beta


def test_a_verified_commit_waits_for_the_step_that_runs(
    weight_lock: WeightLock, alpha: Revision, beta: Revision, threads: list[threading.Thread]
) -> None:
    with weight_lock.on(alpha):
        start(threads, lambda: weight_lock.commit_and_verify(beta))
        until(lambda: weight_lock.waiting == 1, "the commit waits for the lock")
        assert weight_lock.slot.revision == alpha
    until(lambda: weight_lock.slot.revision == beta, "the commit is done")
