"""The Gateway deployment: builds the FastAPI application on the ingress replica, where handles work."""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve

from serve_app import logs
from serve_app.gateway.routes import Gateway
from serve_app.settings import Settings
from serve_app.wire.deployment_names import CONTROLLER, MODEL


def gateway_app(settings: Settings) -> FastAPI:
    """The routes over handles of this application's Model and RolloutController."""
    logs.attach()
    app = serve.get_replica_context().app_name
    return Gateway(
        settings,
        model=serve.get_deployment_handle(MODEL, app),
        controller=serve.get_deployment_handle(CONTROLLER, app),
    ).app()
