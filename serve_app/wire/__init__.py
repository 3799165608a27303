"""Everything that two processes say to each other: a few frozen types, and errors.

No process of its own: the gateway, the replicas, the controller and clients import it. Every module
may be used by every room above. `errors`, `admin`, `deployment_names`, `request_stats` and
`text_score` need neither torch nor Ray.
"""
