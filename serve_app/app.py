"""The wiring: settings in, a Ray Serve application out.

This is the only module that knows every deployment. It imports the rooms; no room imports it.

`serve run serve_app.app:build model=... adapter=... replicas=2`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from hotswap_lib import BASE, AdapterRefused, InvalidEnvelope, load_adapter
from serve_app.controller.deployment import RolloutController
from serve_app.gateway.deployment import gateway_app
from serve_app.gateway.router import STATS_PERIOD_S, RevisionRouter
from serve_app.replica import loading
from serve_app.replica.deployment import Model
from serve_app.replica.embedded_model import EmbeddedModelMissing
from serve_app.replica.loading import UnsupportedModel
from serve_app.settings import InvalidSettings, Settings, parse
from serve_app.wire.deployment_names import CONTROLLER, MODEL

# how often a stopping replica checks that it is idle; a shutdown waits for several of Serve's 2 s
_WAIT_LOOP_S = 0.2


def build(args: dict[str, Any]) -> Application:
    """Returns the application for `serve run` and `serve deploy`. Raises `InvalidSettings`."""
    settings = _checked(parse(args))
    controller = _controller(settings)
    return _gateway(settings, _model(settings, controller), controller)


def _controller(settings: Settings) -> Application:
    return serve.deployment(
        RolloutController,
        name=CONTROLLER,
        num_replicas=1,
        max_ongoing_requests=100_000,  # every replica keeps one report open
        graceful_shutdown_timeout_s=2,
        graceful_shutdown_wait_loop_s=_WAIT_LOOP_S,
        health_check_period_s=2,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": 0},
    ).bind(settings)


def _model(settings: Settings, controller: Application) -> Application:
    return serve.deployment(
        Model,
        name=MODEL,
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,  # running requests finish
        graceful_shutdown_wait_loop_s=_WAIT_LOOP_S,
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(
            request_router_class=RevisionRouter,
            request_router_kwargs={"model_name": settings.model_name},
            request_routing_stats_period_s=STATS_PERIOD_S,
        ),
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": _gpus(settings)},
    ).bind(settings, controller)


def _gateway(settings: Settings, model: Application, controller: Application) -> Application:
    return serve.deployment(
        serve.ingress(lambda: gateway_app(settings))(),
        name="Gateway",
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,  # answers pass through here
        graceful_shutdown_wait_loop_s=_WAIT_LOOP_S,
        ray_actor_options={"num_cpus": 0},
    ).bind(model, controller)


def _checked(settings: Settings) -> Settings:
    """Checks before anything starts that the model can be served and the adapter can be read."""
    try:
        loading.check(settings)
        loading.envelope(settings)
        if settings.adapter is None or settings.adapter == BASE.name:
            return settings
        load_adapter(settings.adapter, name=settings.adapter_name)
    except (UnsupportedModel, EmbeddedModelMissing, AdapterRefused, InvalidEnvelope) as error:
        raise InvalidSettings(str(error)) from error
    # replicas and the controller may have another working directory
    local = Path(settings.adapter).expanduser()
    source = str(local.resolve()) if local.exists() else settings.adapter
    return settings.model_copy(update={"adapter": source})


def _gpus(settings: Settings) -> float:
    if settings.num_gpus is not None:
        return settings.num_gpus
    # before `serve run` has connected to Ray, this machine stands for the cluster
    if ray.is_initialized():
        return 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    return 1.0 if torch.cuda.is_available() else 0.0
