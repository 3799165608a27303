"""The HTTP ingress and the request router of the Model deployment.

Serve runs the Gateway deployment (`deployment.gateway_app`) in its ingress replica. HTTP requests
come in; calls of the Model and of the RolloutController go out through DeploymentHandles. The
gateway holds no state. Serve runs `router.RevisionRouter` in every process with a handle of the
Model.

Other rooms may use `deployment` and `router`.
"""
