"""The journal: what was written is what is read, or the one before it, or a refusal."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.controller.journal import Journal, JournalEntry, JournalUnreadable
from serve_app.rollout.plan import Plan
from serve_app.rollout.state import Fleet, Observed, Progress, ReplicaState, Rollout, State
from serve_app.wire.errors import Fenced
from tests.serve_app.fakes import bucket

names = st.text(min_size=1, max_size=12)
times = st.floats(0, 4e9, allow_nan=False)
plans = st.builds(
    Plan,
    adapter=st.text("abc/:é💾 ", min_size=1).filter(lambda text: text.strip() != ""),
    name=st.none() | names,
    strategy=st.sampled_from(["rolling", "all_at_once"]),
    max_unavailable=st.integers(1, 99),
    in_flight=st.sampled_from([None, "drain", "overlap"]),
    progress_deadline=st.floats(0.001, 86_400),
)
rollouts = st.builds(
    Rollout,
    id=names,
    plan=plans,
    target=names,
    previous=names,
    state=st.sampled_from(State),
    reason=st.none() | st.text(),
    since=st.integers(0, 2**40),
    created_at=times,
    deadline_at=times,
    ended_at=st.none() | times,
    progress=st.none()
    | st.builds(
        Progress, total=st.integers(0, 9), staged=st.integers(0, 9), committed=st.integers(0, 9)
    ),
)
fleets = st.builds(
    Fleet,
    stable=names,
    epoch=st.integers(1, 2**40),
    generation=st.integers(1, 2**40),
    loaded=st.lists(names, max_size=4).map(tuple),
    assigned=st.dictionaries(names, names, max_size=4),
    rollout=st.none() | rollouts,
    past=st.lists(rollouts, max_size=3).map(tuple),
    history=st.lists(names, max_size=4).map(tuple),
    rollouts=st.integers(0, 2**40),
    observed=st.just({}),
)


def entry(stable: str = "old", *, epoch: int = 1) -> JournalEntry:
    return JournalEntry(fleet=Fleet(stable=stable, epoch=epoch), declared=None, sources={})


# a bucket once in the fast tests, where epochs are claimed at the same time
@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def state_uri(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An empty place of each kind."""
    match request.param:
        case "file":
            yield f"file://{tmp_path}/deep/state"
        case "memory":
            yield f"memory://journal-tests/{uuid.uuid4().hex}"
        case "s3":
            with bucket(monkeypatch) as uri:
                yield uri


@settings(max_examples=30, deadline=None)
@given(
    fleet=fleets,
    declared=st.none() | st.text(),
    sources=st.dictionaries(names, st.text(), max_size=3),
)
def test_any_fleet_comes_back_as_it_was_written(
    fleet: Fleet, declared: str | None, sources: dict[str, str]
) -> None:
    uri = f"memory://journal-tests/{uuid.uuid4().hex}"
    written = JournalEntry(fleet=fleet, declared=declared, sources=sources)
    Journal(uri).write(written)
    assert Journal(uri).read() == written


def test_what_replicas_hold_is_not_written(tmp_path: Path) -> None:
    fleet = Fleet(stable="old", observed={"r1": Observed(state=ReplicaState(holds="old"))})
    Journal(str(tmp_path)).write(JournalEntry(fleet=fleet, declared=None, sources={}))
    again = Journal(str(tmp_path)).read()
    assert again is not None
    assert again.fleet == replace(fleet, observed={})


def test_a_journal_that_was_never_written_is_none_and_reading_it_makes_no_file(
    tmp_path: Path,
) -> None:
    assert Journal(str(tmp_path / "deep" / "er")).read() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["{}/state", "{}/state/", "file://{}/state"])
def test_a_path_with_or_without_a_slash_or_a_scheme_is_one_place(tmp_path: Path, form: str) -> None:
    Journal(form.format(tmp_path)).write(entry())
    assert (tmp_path / "state" / "journal.json").is_file()
    assert Journal(str(tmp_path / "state")).read() == entry()


def test_a_new_entry_replaces_the_old_one_and_leaves_no_other_file(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    for stable in ("old", "new", "newer"):
        journal.write(entry(stable))
    assert journal.read() == entry("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]


def test_a_process_that_dies_in_the_middle_of_writing_leaves_the_entry_before(
    tmp_path: Path,
) -> None:
    Journal(str(tmp_path)).write(entry("before"))
    dies = f"""
import resource, signal
from serve_app.controller.journal import JournalEntry, Journal
from serve_app.rollout.state import Fleet
journal = Journal({str(tmp_path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write past the limit kills the process
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
fleet = Fleet(stable="after", history=("x" * 100,) * 5000)
journal.write(JournalEntry(fleet=fleet, declared=None, sources={{}}))
"""
    dead = subprocess.run([sys.executable, "-c", dies], capture_output=True, check=False)
    assert dead.returncode == -signal.SIGXFSZ, dead.stderr
    assert Journal(str(tmp_path)).read() == entry("before")


GOOD = {"version": 1, "declared": None, "sources": {}, "fleet": {"stable": "old"}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        json.dumps(GOOD | {"version": 2}).encode(),
        json.dumps(GOOD | {"fleet": {}}).encode(),
        json.dumps(GOOD | {"fleet": {"stable": "old", "epoch": "first"}}).encode(),
        json.dumps(GOOD | {"sources": ["a"]}).encode(),
        json.dumps({"version": 1}).encode(),
    ],
)
def test_a_journal_that_makes_no_sense_is_refused_and_left_as_it_is(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "journal.json"
    file.write_bytes(content)
    with pytest.raises(JournalUnreadable) as refused:
        Journal(str(tmp_path)).read()
    assert str(refused.value).startswith(f"the journal {file} cannot be read: ")
    assert "\n" not in str(refused.value)
    assert file.read_bytes() == content


def test_a_journal_without_newer_fields_can_still_be_read(tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_text(json.dumps(GOOD))
    assert Journal(str(tmp_path)).read() == entry("old")


def test_an_unreadable_journal_is_an_error_that_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(JournalUnreadable("/j", "no")))
    assert (error.uri, error.why, error.code) == ("/j", "no", "journal_unreadable")


def test_two_journals_in_memory_do_not_see_each_other() -> None:
    one, two = (Journal(f"memory://apart/{name}") for name in ("one", "two"))
    one.write(entry("one"))
    assert two.read() is None
    assert "/apart/one/journal.json" in fsspec.filesystem("memory").find("/apart")


# ---- wherever it is -----------------------------------------------------------------------------


def test_what_was_written_is_read_wherever_it_is(state_uri: str) -> None:
    journal = Journal(state_uri)
    assert (journal.read(), journal.epoch()) == (None, 0)
    for stable in ("old", "new"):
        journal.write(entry(stable))
        assert Journal(state_uri).read() == entry(stable)


def test_an_epoch_is_later_than_every_other_and_than_the_one_that_is_known(state_uri: str) -> None:
    first, second = Journal(state_uri), Journal(state_uri)
    assert [first.claim(after=0), second.claim(after=0), first.claim(after=0)] == [1, 2, 3]
    assert second.claim(after=41) == 42
    assert first.claim(after=7) == 43
    assert second.epoch() == 43


def test_an_epoch_belongs_to_one_however_many_want_one(tmp_path: Path) -> None:
    together(str(tmp_path), wanted=64)


def test_an_epoch_in_a_bucket_belongs_to_one_however_many_want_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bucket(monkeypatch) as uri:
        together(uri, wanted=8)


def together(uri: str, *, wanted: int) -> None:
    journals = [Journal(uri) for _ in range(wanted)]
    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(lambda journal: journal.claim(after=0), journals))
    assert len(set(epochs)) == wanted
    last = journals[epochs.index(max(epochs))]
    last.write(entry("last", epoch=max(epochs)))
    for journal, epoch in zip(journals, epochs, strict=True):
        if journal is not last:
            with pytest.raises(Fenced):
                journal.write(entry("late", epoch=epoch))
    assert last.read() == entry("last", epoch=max(epochs))


def test_only_the_last_epochs_are_kept(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    for _ in range(150):
        last = journal.claim(after=0)
    assert (last, journal.epoch()) == (150, 150)
    assert len(list((tmp_path / "epochs").iterdir())) == 101


def test_a_controller_that_was_replaced_writes_no_more(state_uri: str) -> None:
    old, new = Journal(state_uri), Journal(state_uri)
    first = old.claim(after=0)
    old.write(entry("old", epoch=first))
    second = new.claim(after=first)
    with pytest.raises(Fenced) as fenced:
        old.write(entry("older", epoch=first))
    assert (fenced.value.epoch, fenced.value.by) == (first, second)
    assert new.read() == entry("old", epoch=first), "also before the newer one has written"
    new.write(entry("new", epoch=second))
    assert old.read() == entry("new", epoch=second)


class Slow(Journal):
    """Looks, then is overtaken, then writes."""

    def check(self, epoch: int) -> None:
        super().check(epoch)
        Journal(self.uri.removesuffix("/journal.json")).claim(after=epoch)


def test_a_decision_that_the_newer_controller_may_not_have_read_is_no_decision(
    state_uri: str,
) -> None:
    slow = Slow(state_uri)
    with pytest.raises(Fenced):
        slow.write(entry(epoch=slow.claim(after=0)))


def test_an_epoch_that_was_claimed_but_not_yet_used_is_no_reason_to_stop(state_uri: str) -> None:
    journal = Journal(state_uri)
    first = journal.claim(after=0)
    journal.claim(after=first)
    journal.write(entry(epoch=first))
    assert journal.read() == entry(epoch=first)


def test_an_unreadable_journal_is_put_aside_and_kept(state_uri: str) -> None:
    journal = Journal(state_uri)
    fs, path = fsspec.url_to_fs(journal.uri)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, b"{")
    with pytest.raises(JournalUnreadable):
        journal.read()
    aside = journal.set_aside()
    assert journal.read() is None
    assert fs.cat_file(aside) == b"{"
    journal.write(entry())
    assert journal.read() == entry()
