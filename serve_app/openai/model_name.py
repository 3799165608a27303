"""Decides which revision a request names. Nothing else reads a revision from a `model`."""

from __future__ import annotations

from serve_app.wire.errors import InvalidRequest


def find_pin(model: str | None, given: str | None, *, served: str) -> str | None:
    """Returns the revision that a request names, or None for the default revision.

    The result is not checked against the revisions that are served: the engine does that.

    Args:
        model: the request's `model`: the served name, `NAME:REVISION`, or, as in vLLM, the name of
            a loaded adapter.
        given: the revision in the request's header, or in the `pin` of a handle call.
        served: the name under which the base model is served.

    Raises:
        InvalidRequest: `model` and `given` name different revisions.
    """
    named = _revision_in(model, served)
    if named is not None and given is not None and named != given:
        message = f"`model` names revision {named!r}, and the request is pinned to {given!r}"
        raise InvalidRequest(400, "conflicting_revisions", message, "model")
    return named if given is None else given


def _revision_in(model: str | None, served: str) -> str | None:
    if model is None or model == served:  # first, because a served name may have a ':' in it
        return None
    return model.removeprefix(f"{served}:")
