"""Every error of the application that crosses a process, with its stable code.

    AppError                            code                        raised by
    ├── InvalidRequest                  its own `code`              gateway, replica
    ├── NotAuthorized                   not_authorized              gateway
    ├── NoReplicaReady                  not_ready                   gateway
    ├── RevisionNotServed               model_not_found             replica
    ├── GenerationFailed                generation_failed           replica
    ├── EngineStopped                   engine_stopped              replica
    ├── DeadlineExceeded                deadline_exceeded           replica
    ├── LanesTaken                      lanes_taken                 replica
    ├── FleetNotReady                   fleet_not_ready             controller
    ├── PlanImpossible                  plan_impossible             controller
    ├── ProbeInvalid                    probe_invalid               controller
    ├── RolloutNotFound                 rollout_not_found           controller
    ├── NothingToUndo                   nothing_to_undo             controller
    ├── KeyReused                       idempotency_key_reused      controller
    ├── AdapterAlreadyLoaded            adapter_already_loaded      controller
    ├── AdapterNotLoaded                adapter_not_loaded          controller
    ├── AdapterLoadFailed               adapter_load_failed         controller
    ├── AdapterLoadTimeout              adapter_load_timeout        controller
    └── Fenced                          controller_replaced         controller
    RolloutError (`serve_app.rollout.errors`)
    ├── IllegalEvent                    illegal_event               controller
    └── GenerationMismatch              generation_mismatch         controller
    HotswapError (`hotswap_lib.errors`)
    ├── AdapterRefused and its kinds                                controller
    ├── RevisionLost                    revision_lost               controller
    └── ImageUnavailable                image_unavailable           controller

The facts are positional arguments and `__str__` makes the sentence, so each error survives
`pickle`. `serve_app.gateway.http_errors` maps them to HTTP statuses.

Longer than usual: every error is here, so that its code and sentence are found in one place.
"""

from __future__ import annotations

from hotswap_lib import HotswapError

__all__ = [
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


class AppError(Exception):
    """The root. `code` never changes for a given class and is shown to clients."""

    code = "error"


# ---- requests -----------------------------------------------------------------------------------


class InvalidRequest(AppError):
    """A request that this server does not run. `status` is the HTTP status."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, code, message, param)
        self.status, self.code, self.message, self.param = status, code, message, param

    def __str__(self) -> str:
        return self.message


class NotAuthorized(AppError):
    """An admin route was called without the bearer token of the settings."""

    code = "not_authorized"

    def __str__(self) -> str:
        return "the admin routes need the bearer token of the settings"


class NoReplicaReady(AppError):
    """No replica is running that could answer."""

    code = "not_ready"

    def __str__(self) -> str:
        return "no replica is ready to answer; ask again in a moment"


class RevisionNotServed(AppError):
    """A request names a model or revision that this replica does not serve."""

    code = "model_not_found"

    def __init__(self, pin: str, served: tuple[str, ...]) -> None:
        super().__init__(pin, served)
        self.pin, self.served = pin, served

    def __str__(self) -> str:
        return f"no model or revision {self.pin!r} is served; live are {', '.join(self.served)}"


class GenerationFailed(AppError):
    """The engine could not finish a request."""

    code = "generation_failed"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the generation failed: {self.why}"


class EngineStopped(AppError):
    """The thread that runs the model has died; the replica must be replaced."""

    code = "engine_stopped"

    def __str__(self) -> str:
        return "the thread that runs the model has stopped"


class DeadlineExceeded(AppError):
    """The request took longer than `request_timeout_s`; it was cancelled."""

    code = "deadline_exceeded"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"the request was not finished after {self.timeout_s:g} s"


class LanesTaken(AppError):
    """Every lane is busy with another revision, and `lane_overflow` is `refuse`."""

    code = "lanes_taken"

    def __init__(self, revision: str, lanes: int) -> None:
        super().__init__(revision, lanes)
        self.revision, self.lanes = revision, lanes

    def __str__(self) -> str:
        return f"all {self.lanes} lanes are busy with other revisions than {self.revision}"


# ---- rollouts -----------------------------------------------------------------------------------


class FleetNotReady(AppError):
    """No replica has reported yet, so no adapter can be checked."""

    code = "fleet_not_ready"

    def __str__(self) -> str:
        return "no replica has reported yet, so no adapter can be checked against the fleet"


class PlanImpossible(AppError):
    """This fleet cannot do what the plan asks for; nothing has changed."""

    code = "plan_impossible"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the plan is impossible here: {self.why}"


class ProbeInvalid(AppError):
    """A probe function does not exist, or did not return scores."""

    code = "probe_invalid"

    def __init__(self, function: str, why: str) -> None:
        super().__init__(function, why)
        self.function, self.why = function, why

    def __str__(self) -> str:
        return f"the probe {self.function} {self.why}"


class RolloutNotFound(AppError):
    """No rollout has this id."""

    code = "rollout_not_found"

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        return f"there is no rollout {self.id!r}"


class NothingToUndo(AppError):
    """There is no earlier revision; `to` is the one that was asked for, None for the last one."""

    code = "nothing_to_undo"

    def __init__(self, to: str | None = None) -> None:
        super().__init__(to)
        self.to = to

    def __str__(self) -> str:
        which = "earlier revision" if self.to is None else f"earlier revision {self.to!r}"
        return f"there is no {which} to go back to"


class KeyReused(AppError):
    """The idempotency key belongs to another request; nothing has changed."""

    code = "idempotency_key_reused"

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"the idempotency key {self.key!r} was used for another request"


class Fenced(AppError):
    """Another controller has taken over; this one makes no more decisions."""

    code = "controller_replaced"

    def __init__(self, epoch: int, by: int) -> None:
        super().__init__(epoch, by)
        self.epoch, self.by = epoch, by

    def __str__(self) -> str:
        return f"the controller of epoch {self.epoch} was replaced by the one of epoch {self.by}"


# ---- loaded adapters ----------------------------------------------------------------------------


class AdapterAlreadyLoaded(AppError):
    """Another content is loaded under the name; `load_inplace` would replace it."""

    code = "adapter_already_loaded"

    def __init__(self, name: str, loaded: str, asked: str) -> None:
        super().__init__(name, loaded, asked)
        self.name, self.loaded, self.asked = name, loaded, asked

    def __str__(self) -> str:
        return f"{self.loaded} is loaded as {self.name!r}; load_inplace puts {self.asked} there"


class AdapterNotLoaded(AppError):
    """No adapter is loaded under the name."""

    code = "adapter_not_loaded"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"no adapter is loaded as {self.name!r}"


class AdapterLoadFailed(AppError):
    """A replica cannot serve the adapter; it was unloaded again on all replicas."""

    code = "adapter_load_failed"

    def __init__(self, revision: str, why: str) -> None:
        super().__init__(revision, why)
        self.revision, self.why = revision, why

    def __str__(self) -> str:
        return f"{self.revision} was not loaded: {self.why}"


class AdapterLoadTimeout(AppError):
    """Some replicas did not serve the adapter in time; it was unloaded again on all replicas."""

    code = "adapter_load_timeout"

    def __init__(self, revision: str, replicas: tuple[str, ...], timeout_s: float) -> None:
        super().__init__(revision, replicas, timeout_s)
        self.revision, self.replicas, self.timeout_s = revision, replicas, timeout_s

    def __str__(self) -> str:
        who = ", ".join(self.replicas) or "no replica is running, so it"
        return f"{self.revision} was not loaded: {who} did not serve it within {self.timeout_s:g} s"


# ---- images -------------------------------------------------------------------------------------


class RevisionLost(HotswapError):
    """The stored copy of an adapter is missing or has other content."""

    code = "revision_lost"

    def __init__(self, revision: str, where: str) -> None:
        super().__init__(revision, where)
        self.revision, self.where = revision, where

    def __str__(self) -> str:
        return f"revision {self.revision} is no longer the content that was stored at {self.where}"


class ImageUnavailable(HotswapError):
    """The image of a revision cannot be made now."""

    code = "image_unavailable"

    def __init__(self, revision: str, why: str) -> None:
        super().__init__(revision, why)
        self.revision, self.why = revision, why

    def __str__(self) -> str:
        return f"the image of {self.revision} is not available: {self.why}"
