"""The admin routes (`/admin/*`) and vLLM's routes for loaded adapters, behind a bearer token.

Each route calls the RolloutController through its handle and returns its view as it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray.serve.handle import DeploymentHandle

from serve_app.gateway.http_errors import documented
from serve_app.gateway.request_body import JsonRoute
from serve_app.rollout.plan import Plan
from serve_app.rollout.precondition import Precondition
from serve_app.settings import Settings
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    FleetView,
    LoadAdapter,
    RolloutList,
    RolloutView,
    UnloadAdapter,
)
from serve_app.wire.errors import NotAuthorized


def _precondition(
    expected_generation: Annotated[
        int | None, Query(description="answer 409 if the fleet's generation is not this one")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=256,
            description="chosen by the client; a second request with the same key changes nothing",
        ),
    ] = None,
) -> Precondition:
    return Precondition(expected_generation=expected_generation, key=idempotency_key)


Conditions = Annotated[Precondition, Depends(_precondition)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


class AdminRoutes:
    """The routes over the controller's handle."""

    def __init__(self, settings: Settings, controller: DeploymentHandle) -> None:
        self._token = settings.admin_token
        self._controller = controller

    def rollout_router(self) -> APIRouter:
        router = self._closed_router("/admin", tag="admin")
        router.get("/fleet")(self.fleet)
        router.get("/rollouts")(self.rollouts)
        router.get("/rollouts/{id}", responses=documented(404))(self.rollout)
        bodies = documented(400, 408, 409, 413, 415, 503)
        router.post("/rollouts", status_code=201, responses=bodies)(self.start)
        router.post("/rollouts/{id}/promote", responses=documented(404, 409))(self.promote)
        for verb in ("abort", "pause", "resume", "retry"):
            path = f"/rollouts/{{id}}/{verb}"
            router.post(path, name=verb, responses=documented(404, 409))(self._rollout_verb(verb))
        router.post("/undo", status_code=201, responses=documented(409))(self.undo)
        return router

    def adapter_router(self) -> APIRouter:
        router = self._closed_router("/v1", tag="adapters")
        bodies = documented(400, 404, 408, 409, 413, 415, 503, 504)
        router.post("/load_lora_adapter", responses=bodies)(self.load_adapter)
        router.post("/unload_lora_adapter", responses=bodies)(self.unload_adapter)
        router.get("/lora_adapters")(self.adapters)
        return router

    def _closed_router(self, prefix: str, *, tag: str) -> APIRouter:
        """A router that asks for the bearer token, if the settings have one."""
        closed = self._token is not None
        return APIRouter(
            prefix=prefix,
            tags=[tag],
            route_class=JsonRoute,
            dependencies=[Depends(self._authorize)] if closed else [],
            responses=documented(401) if closed else {},
        )

    async def _authorize(self, credentials: Credentials) -> None:
        given = credentials.credentials if credentials else ""
        if not secrets.compare_digest(given.encode(), (self._token or "").encode()):
            raise NotAuthorized

    # ---- rollouts ---------------------------------------------------------------------------

    async def fleet(self) -> FleetView:
        fleet: FleetView = await self._controller.fleet.remote()
        return fleet

    async def rollouts(self) -> RolloutList:
        return RolloutList(data=await self._controller.rollouts.remote())

    async def rollout(self, id: str) -> RolloutView:
        return await self._rollout("rollout", id)

    async def start(self, plan: Plan, conditions: Conditions) -> RolloutView:
        return await self._rollout("start_rollout", plan, **conditions.args())

    async def promote(
        self,
        id: str,
        conditions: Conditions,
        full: Annotated[
            bool, Query(description="skip all remaining steps, not only the current one")
        ] = False,
    ) -> RolloutView:
        return await self._rollout("promote", id, full=full, **conditions.args())

    def _rollout_verb(self, verb: str) -> Callable[[str, Conditions], Awaitable[RolloutView]]:
        """The route of a verb whose only argument is the rollout's id."""

        async def route(id: str, conditions: Conditions) -> RolloutView:
            return await self._rollout(verb, id, **conditions.args())

        return route

    async def undo(
        self,
        conditions: Conditions,
        to: Annotated[
            str | None,
            Query(min_length=1, description="an earlier revision; default: the previous one"),
        ] = None,
    ) -> RolloutView:
        return await self._rollout("undo", to=to, **conditions.args())

    async def _rollout(self, method: str, *args: Any, **named: Any) -> RolloutView:
        view: RolloutView = await getattr(self._controller, method).remote(*args, **named)
        return view

    # ---- loaded adapters --------------------------------------------------------------------

    async def load_adapter(self, body: LoadAdapter) -> AdapterView:
        conditions = Precondition(expected_generation=body.expected_generation)
        view: AdapterView = await self._controller.load_adapter.remote(
            body.lora_name, body.lora_path, load_inplace=body.load_inplace, **conditions.args()
        )
        return view

    async def unload_adapter(self, body: UnloadAdapter) -> AdapterView:
        conditions = Precondition(expected_generation=body.expected_generation)
        view: AdapterView = await self._controller.unload_adapter.remote(
            body.lora_name, **conditions.args()
        )
        return view

    async def adapters(self) -> AdapterList:
        fleet: FleetView = await self._controller.fleet.remote()
        data: list[AdapterView] = await self._controller.adapters.remote()
        return AdapterList(data=data, generation=fleet.generation)
