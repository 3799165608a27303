"""A feature flag sets a new adapter's share of the traffic: 0 rolls it back, 100 promotes it.

    python -m examples.feature_flag ./adapters/support-bot-v7 --flag flag.json

The flag is a JSON file at any fsspec URI, `{"support-bot-v7": 25}`, as a flag service writes it.
The first value of 1 or more starts a canary whose steps all wait to be promoted. Larger values
promote it to the last step that is within the flag, 100 promotes it everywhere, 0 rolls it back. A
canary's share only grows: a smaller value, other than 0, changes nothing.

The script ends with the rollout: exit code 0 if the adapter was promoted, 3 if it was rolled back.
If it is stopped and started again, it continues with the rollout that it started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import fsspec

from serve_app.client import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
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
    """The number of `WEIGHTS` that are within the flag."""
    return sum(weight <= flag for weight in WEIGHTS)


def start_or_continue(client: HotswapClient, adapter: str) -> RolloutView:
    """The fleet's rollout if it is to `adapter`, else a new canary whose steps all wait."""
    fleet = client.fleet()
    if fleet.rollout is not None and fleet.rollout.source == adapter:
        return fleet.rollout
    plan = Plan(
        adapter=adapter,
        strategy="canary",
        steps=tuple(CanaryStep(weight=weight, hold="manual") for weight in WEIGHTS),
    )
    return client.start(plan, expected_generation=fleet.generation)


def follow(client: HotswapClient, rollout: RolloutView, flag: float) -> RolloutView:
    """Promote or abort the rollout as the flag requires; returns the rollout after that."""
    canary = rollout.canary
    if rollout.ended or canary is None:
        return rollout
    if flag == 0:
        print("the flag is 0: rolling back to stable", flush=True)
        return client.abort(rollout.id)
    if canary.pause != "step":  # still on its way to the step
        return rollout
    if flag == 100:
        print("the flag is 100: promoting everywhere", flush=True)
        return client.promote(rollout.id, full=True)
    if steps(flag) > canary.step + 1:
        print(f"the flag is {flag:g}: promoting past {canary.weight:g} %", flush=True)
        return client.promote(rollout.id)
    return rollout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="a path, Hub id or URI, as the server resolves it")
    parser.add_argument("--flag", required=True, help="the JSON file, any fsspec URI")
    parser.add_argument(
        "--name", help="the flag's name; by default the last part of the adapter's path"
    )
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--token")
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between two reads of the flag"
    )
    given = parser.parse_args(arguments)
    name = given.name or given.adapter.rstrip("/").rpartition("/")[2]
    flag = Flag(given.flag, name)
    try:
        with HotswapClient(given.url, token=given.token) as client:
            while steps(flag.read()) == 0:
                time.sleep(given.every)
            rollout = start_or_continue(client, given.adapter)
            print(f"{rollout.id}: {rollout.target}", flush=True)
            while not rollout.ended:
                time.sleep(given.every)
                rollout = follow(client, client.rollout(rollout.id), flag.read())
    except RequestRejected as error:
        print(f"rejected: {error.message} [{error.code}]", file=sys.stderr)
        return 1
    except ServerUnreachable as error:
        print(str(error), file=sys.stderr)
        return 4
    print(f"{rollout.target}: {rollout.state}")
    return 0 if rollout.state == "succeeded" else 3


if __name__ == "__main__":
    sys.exit(main())
