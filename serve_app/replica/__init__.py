"""The replica: one process for each GPU with a prepared, compiled model in it.

Ray Serve runs `deployment.Model` in it. In come requests of the gateway, and of scripts through a
deployment handle, as OpenAI's request documents; out go OpenAI's response documents. In the other
direction the replica reports its state to the controller and receives its desired state, with the
adapter images that it needs (`control_loop`).

Only `serve_app.app` wires this room to the others. It uses `deployment` (the Serve deployment) and
`loading` (checks before anything starts). Examples, benchmarks and tests also use `embedded_model`
(the default model and the shipped adapters). The other modules are for this room alone.
"""
