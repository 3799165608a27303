"""The wiring: settings in, a Ray Serve application out. Imports everything; nothing imports it.

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

_WAIT_LOOP_S = 0.2  # how often a stopping replica looks whether it is idle; Serve's 2 s add up


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run` and `serve deploy`. Raises `InvalidSettings`."""
    settings = _checked(parse(args))
    controller = serve.deployment(
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
    model = serve.deployment(
        Model,
        name=MODEL,
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,  # what runs is finished
        graceful_shutdown_wait_loop_s=_WAIT_LOOP_S,
        health_check_period_s=5,
        request_router_config=RequestRouterConfig(
            request_router_class=RevisionRouter,
            request_router_kwargs={"model_name": settings.model_name},
            request_routing_stats_period_s=STATS_PERIOD_S,
        ),
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": _gpus(settings)},
    ).bind(settings, controller)
    gateway = serve.deployment(
        serve.ingress(lambda: gateway_app(settings))(),
        name="Gateway",
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,  # answers leave through here
        graceful_shutdown_wait_loop_s=_WAIT_LOOP_S,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(model, controller)


def _checked(settings: Settings) -> Settings:
    """What can be known before anything starts: the model can be served, the adapter be read."""
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
    # `serve run` asks before it has connected to Ray: then this machine's word counts
    if ray.is_initialized():
        return 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    return 1.0 if torch.cuda.is_available() else 0.0
