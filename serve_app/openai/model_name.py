"""The revision that a request's `model` names."""

from __future__ import annotations

from serve_app.wire.errors import InvalidRequest


def find_pin(model: str | None, given: str | None, *, served: str) -> str | None:
    """The revision that a request names; None for the default.

    Args:
        model: the request's `model`: the served name, `NAME:REVISION`, or, as in vLLM, the name of
            a loaded adapter alone. Whether there is such a revision, the engine knows.
        given: what the request names beside that, in a header or a handle call.

    Raises:
        InvalidRequest: the two are not the same.
    """
    named = _pin_in(model, served)
    if named is not None and given is not None and named != given:
        message = f"the model names revision {named!r}, and the request pins {given!r}"
        raise InvalidRequest(400, "conflicting_revisions", message, "model")
    return named if given is None else given


def _pin_in(model: str | None, served: str) -> str | None:
    if model is None or model == served:  # first, because a served name may have a ':' in it
        return None
    return model.removeprefix(f"{served}:")
