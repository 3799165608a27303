"""Everything of Ray that is private or undocumented, in one place. Each use has a test.

tests/serve_app/wire/test_ray_internals.py fails with the name of what changed in Ray.
"""

from __future__ import annotations


def cause_of(error: BaseException) -> BaseException:
    """The exception that a remote call raised on the other side, as it was raised there.

    Ray wraps it in a RayTaskError and keeps it in an undocumented attribute, `cause`.
    """
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
