"""A feature flag decides how much of the traffic a new adapter gets: 0 takes it back, 100 is all.

    python -m examples.feature_flag ./adapters/support-bot-v7 --flag flag.json

The flag is a JSON file, `{"support-bot-v7": 25}`: whatever a flag service writes, at any fsspec
URI. This follows it: the first value of 1 or more begins a canary whose every step waits to be
promoted; larger values promote it to the step that carries no more than the flag says; 100 promotes
it everywhere; 0 takes it back. A canary's share only grows: a smaller value than before, other than
0, changes nothing.

It ends with the rollout, 0 when the adapter was promoted and 3 when it was taken back. Killed and
started again, it goes on with the rollout that it began.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import fsspec

from serve_app.client.http import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.rollout.plan import CanaryStep, Plan
from serve_app.wire.admin import RolloutView

WEIGHTS = (1, 5, 10, 25, 50)


class Flag:
    """One value in a JSON file. A file that cannot be read leaves the value as it was."""

    def __init__(self, uri: str, name: str) -> None:
        self._uri, self._name = uri, name
        self.value = 0.0

    def read(self) -> float:
        try:
            with fsspec.open(self._uri, "rt", encoding="utf-8") as file:
                self.value = min(max(float(json.load(file)[self._name]), 0.0), 100.0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"the flag cannot be read ({error}); it stays at {self.value:g}", flush=True)
        return self.value


def steps(flag: float) -> int:
    """How many of `WEIGHTS` the flag allows."""
    return sum(weight <= flag for weight in WEIGHTS)


def follow(client: HotswapClient, rollout: RolloutView, flag: float) -> RolloutView:
    """One look: the rollout after what the flag says now."""
    canary = rollout.canary
    if rollout.ended or canary is None:
        return rollout
    if flag == 0:
        print("the flag is 0: back to stable", flush=True)
        return client.abort(rollout.id)
    if canary.pause != "step":  # it is on its way
        return rollout
    if flag == 100:
        print("the flag is 100: everywhere", flush=True)
        return client.promote(rollout.id, full=True)
    if steps(flag) > canary.step + 1:
        print(f"the flag is {flag:g}: past {canary.weight:g} %", flush=True)
        return client.promote(rollout.id)
    return rollout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="a path, Hub id or URI, as the server resolves it")
    parser.add_argument("--flag", required=True, help="the JSON file, any fsspec URI")
    parser.add_argument("--name", help="of the flag; the adapter's last part by default")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--token")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    given = parser.parse_args(arguments)
    name = given.name or given.adapter.rstrip("/").rpartition("/")[2]
    flag = Flag(given.flag, name)
    plan = Plan(
        adapter=given.adapter,
        strategy="canary",
        steps=tuple(CanaryStep(weight=weight, hold="manual") for weight in WEIGHTS),
    )
    try:
        with HotswapClient(given.url, token=given.token) as client:
            while steps(flag.read()) == 0:
                time.sleep(given.every)
            fleet = client.fleet()
            rollout = fleet.rollout
            if rollout is None or rollout.source != given.adapter:  # else it goes on with it
                rollout = client.start(plan, expected_generation=fleet.generation)
            print(f"{rollout.id}: {rollout.target}", flush=True)
            while not rollout.ended:
                time.sleep(given.every)
                rollout = follow(client, client.rollout(rollout.id), flag.read())
    except RequestRejected as refused:
        print(f"refused: {refused.message} [{refused.code}]", file=sys.stderr)
        return 1
    except ServerUnreachable as away:
        print(str(away), file=sys.stderr)
        return 4
    print(f"{rollout.target}: {rollout.state}")
    return 0 if rollout.state == "succeeded" else 3


if __name__ == "__main__":
    sys.exit(main())
