"""The control lane's documents: a revision's full text, and a trip between two processes."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotswap_lib import BASE, AdapterNotFound, Revision
from serve_app.rollout.state import Desired, Failure, ReplicaState
from serve_app.wire.admin import LaneView, StartView, SwapView
from serve_app.wire.reports import Answer, Report

digests = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(name=st.from_regex(r"[^\s@:\x00-\x1f\x7f]+", fullmatch=True), digest=digests)
def test_the_full_text_of_a_revision_is_the_revision(name: str, digest: str) -> None:
    revision = Revision(name, digest)
    assert revision.key == f"{name}@{digest}"
    assert Revision.parse(revision.key) == revision


@pytest.mark.parametrize("text", ["", "base", "base@123", "a b@" + "0" * 64])
def test_anything_else_is_no_revision(text: str) -> None:
    with pytest.raises(Exception, match=r"digest|name"):
        Revision.parse(text)


def test_a_report_and_an_answer_arrive_as_they_were_sent() -> None:
    want = Desired(epoch=2, generation=7, hold=BASE.key, also_serves=("x",), in_flight="overlap")
    report = Report(
        replica="r1",
        layout="f" * 64,
        acting_on=want,
        state=ReplicaState(
            holds=BASE.key,
            serving=True,
            failure=Failure(revision="x", reason="no", generation=7),
            also_serves=("x",),
            refused=(Failure(revision="y", reason="no", generation=7),),
        ),
        running=3,
        recompiles=0,
        limit_hits=0,
        last_swap=SwapView(revision="base@00000000", commit_us=12.5),
        pid=1,
        node="n",
        admits=True,
        lanes=(LaneView(revision="base@00000000", running=2),),
        start=StartView(load_s=1.0, warm_up_s=2.0, compile_cache="miss"),
    )
    assert pickle.loads(pickle.dumps(report)) == report
    refused = Answer(desired=want, refused={"x": AdapterNotFound("x", None, "gone")})
    again = pickle.loads(pickle.dumps(refused))
    assert (again.desired, str(again.refused["x"])) == (want, "adapter 'x': gone")


def test_an_answer_that_says_nothing_is_no_news() -> None:
    assert Answer() == Answer(desired=None, images={}, refused={}, introduce=False)
