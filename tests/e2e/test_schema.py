"""The API does what its own OpenAPI document says, for requests that nobody thought of.

Every route is asked, those that change the fleet as well: an adapter that is made up is refused,
and a rollout to `base`, an undo or an abort hurt nobody here. Left out of the checks is
`positive_data_acceptance`: no JSON schema says that a prompt fits the context, that `best_of` is
`n`, or that there is such an adapter.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Cluster, deployed
from .fleet import Fleet
from .tiny_world import TinyWorld

ENOUGH_S = 25
TOKEN = "secret"


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, world: TinyWorld) -> Iterator[Fleet]:
    """Closed to strangers, and soon done with any answer."""
    with deployed(
        cluster, world, app="schema", replicas=1, max_model_len=64, admin_token=TOKEN
    ) as running:
        yield running


@pytest.mark.slow
def test_no_request_is_answered_in_another_way_than_the_documentation_says(
    fleet: Fleet, tmp_path: Path
) -> None:
    schemathesis = str(Path(sys.executable).with_name("schemathesis"))
    command = [schemathesis, "run", f"{fleet.url}/openapi.json"]
    command += ["--phases=coverage,fuzzing", "--exclude-checks=positive_data_acceptance"]
    command += ["--seed=1", "--generation-deterministic", "--max-examples=20", "--no-shrink"]
    command += [f"--max-time={ENOUGH_S}", "--request-timeout=30", "--no-color", "--warnings=off"]
    command += ["--header", f"Authorization:Bearer {TOKEN}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
