"""The default `state_uri`: a folder of this Ray session.

It outlives a controller, a replica and a redeploy, and ends with the cluster, so that a new cluster
does not resume an old one's state. It is lost with the head node; `hotswap status` warns of that.
"""

from __future__ import annotations

from pathlib import Path

import ray


def default_state_uri(app_name: str) -> str:
    context = ray.get_runtime_context()
    return str(Path(context.get_temp_dir()) / context.get_session_name() / "hotswap" / app_name)
