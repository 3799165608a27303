"""The client's errors."""

from __future__ import annotations

import pickle

import pytest

from serve_app.client.errors import RequestRejected, ServerUnreachable


@pytest.mark.parametrize(
    "error",
    [
        RequestRejected(409, "nothing_to_undo", "no"),
        ServerUnreachable("http://fleet.test:8000", "refused"),
    ],
)
def test_the_errors_survive_a_pickle(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), vars(again), str(again)) == (type(error), vars(error), str(error))
