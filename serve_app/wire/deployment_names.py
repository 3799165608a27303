"""Names of the deployments, for `serve.get_deployment_handle(name, app)`."""

from __future__ import annotations

MODEL = "Model"
CONTROLLER = "RolloutController"
