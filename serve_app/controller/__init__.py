"""The RolloutController deployment: one replica that decides what the whole fleet holds.

In: reports of replicas and requests of users, both through its Serve handle, and time. Out:
documents with adapter images as answers to reports, and admin views. Every decision is in the
journal first.

For others: `deployment.RolloutController` (for `serve_app.app`) and `deployment.Controller`, the
same without Ray Serve. Everything else is used inside this room alone.
"""
