"""Errors that cross a process: one list, one tree, and a trip through pickle."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

from hotswap_lib import HotswapError
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent, RolloutError
from serve_app.wire import errors
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    AdapterNotLoaded,
    AppError,
    DeadlineExceeded,
    EngineStopped,
    Fenced,
    FleetNotReady,
    GenerationFailed,
    ImageUnavailable,
    InvalidRequest,
    KeyReused,
    LanesTaken,
    NoReplicaReady,
    NotAuthorized,
    NothingToUndo,
    PlanImpossible,
    ProbeInvalid,
    RevisionLost,
    RevisionNotServed,
    RolloutNotFound,
)

# each error once, and its code
EXAMPLES: dict[str, Exception] = {
    "adapter_already_loaded": AdapterAlreadyLoaded("bot", "bot@1", "bot@2"),
    "adapter_load_failed": AdapterLoadFailed("bot@1", "replica r1: no memory"),
    "adapter_load_timeout": AdapterLoadTimeout("bot@1", ("r1", "r2"), 60.0),
    "adapter_not_loaded": AdapterNotLoaded("bot"),
    "controller_replaced": Fenced(1, 2),
    "deadline_exceeded": DeadlineExceeded(2.5),
    "engine_stopped": EngineStopped(),
    "fleet_not_ready": FleetNotReady(),
    "generation_failed": GenerationFailed("out of memory"),
    "generation_mismatch": GenerationMismatch(3, 4),
    "idempotency_key_reused": KeyReused("k"),
    "illegal_event": IllegalEvent("to resume", "it has ended"),
    "image_unavailable": ImageUnavailable("bot@1", "no space"),
    "lanes_taken": LanesTaken("bot@1", 2),
    "model_not_found": RevisionNotServed("bot", ("base", "alpha@1")),
    "not_authorized": NotAuthorized(),
    "not_ready": NoReplicaReady(),
    "nothing_to_undo": NothingToUndo("bot@1"),
    "plan_impossible": PlanImpossible("one replica"),
    "probe_invalid": ProbeInvalid("a:b", "is not a function"),
    "revision_lost": RevisionLost("bot@1", "/adapters"),
    "rollout_not_found": RolloutNotFound("rollout-9"),
    "too_many_requests": InvalidRequest(429, "too_many_requests", "try again", None),
}


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_error_keeps_its_code_its_sentence_and_its_facts_through_pickle(code: str) -> None:
    error = EXAMPLES[code]
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert again.code == code
    assert "\n" not in str(again)
    assert len(str(again)) > len(code) / 2, "a sentence for people"


def test_the_list_of_errors_is_this_one() -> None:
    assert errors.__all__ == [
        "AdapterAlreadyLoaded",
        "AdapterLoadFailed",
        "AdapterLoadTimeout",
        "AdapterNotLoaded",
        "AppError",
        "DeadlineExceeded",
        "EngineStopped",
        "Fenced",
        "FleetNotReady",
        "GenerationFailed",
        "ImageUnavailable",
        "InvalidRequest",
        "KeyReused",
        "LanesTaken",
        "NoReplicaReady",
        "NotAuthorized",
        "NothingToUndo",
        "PlanImpossible",
        "ProbeInvalid",
        "RevisionLost",
        "RevisionNotServed",
        "RolloutNotFound",
    ]


def test_every_error_is_in_the_list_and_has_an_example() -> None:
    defined = {
        name
        for name, one in inspect.getmembers(errors, inspect.isclass)
        if one.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    examples = {type(error).__name__ for error in EXAMPLES.values()}
    assert examples == (defined - {"AppError"}) | {"GenerationMismatch", "IllegalEvent"}


def test_the_tree_in_the_docstring_has_every_error_below_its_root() -> None:
    tree = str(errors.__doc__)
    app, rest = tree.split("RolloutError", 1)
    rollout, hotswap = rest.split("HotswapError", 1)
    for code, error in EXAMPLES.items():
        roots = {AppError: app, RolloutError: rollout, HotswapError: hotswap}
        [part] = [text for root, text in roots.items() if isinstance(error, root)]
        [line] = [line for line in part.splitlines() if f" {type(error).__name__} " in line]
        assert code in line or isinstance(error, InvalidRequest)


def test_errors_and_admin_views_need_neither_torch_nor_ray() -> None:
    modules = "serve_app.wire.errors, serve_app.wire.admin, serve_app.rollout.machine"
    code = f"import sys, {modules}; print(*({{'torch', 'ray', 'transformers'}} & {{*sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
