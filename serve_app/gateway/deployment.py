"""The Gateway deployment: the FastAPI application over handles of the Model and the controller."""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app import logs
from serve_app.gateway.fastapi_internals import edit_openapi
from serve_app.gateway.http_errors import ERRORS, install_error_handlers
from serve_app.gateway.readiness import Readiness
from serve_app.gateway.request_body import BodyLimit
from serve_app.gateway.routes import InferenceRoutes
from serve_app.gateway.routes_admin import AdminRoutes
from serve_app.openai.response_schemas import complete_openapi
from serve_app.settings import Settings
from serve_app.wire.deployment_names import CONTROLLER, MODEL


def gateway_app(settings: Settings) -> FastAPI:
    """Builds the application in the ingress replica: DeploymentHandles work only inside Serve."""
    logs.attach()
    app = serve.get_replica_context().app_name
    return build_app(
        settings,
        model=serve.get_deployment_handle(MODEL, app),
        controller=serve.get_deployment_handle(CONTROLLER, app),
    )


def build_app(
    settings: Settings,
    *,
    model: DeploymentHandle,
    controller: DeploymentHandle,
    readiness: Readiness | None = None,
) -> FastAPI:
    """Builds the application over two handles, or over fakes of them."""
    readiness = readiness or Readiness(controller)
    # no redirects for a missing slash: their responses would not have OpenAI's format
    app = FastAPI(
        title="hotswap",
        summary="Live LoRA adapters on a fleet",
        responses=ERRORS,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.include_router(InferenceRoutes(settings, model, controller, readiness).router())
    admin = AdminRoutes(settings, controller)
    app.include_router(admin.rollout_router())
    app.include_router(admin.adapter_router())
    edit_openapi(app, complete_openapi)
    return app
