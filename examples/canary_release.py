"""A release job: roll out one adapter as a canary, print its progress, and exit with the result.

    python -m examples.canary_release ./adapters/support-bot-v7 --golden golden.jsonl

The adapter gets 10 % of the requests, then 50 %, then all. Each step has to pass its analysis. If
one fails, the fleet rolls back by itself, even if this script has stopped. Exit codes: 0, promoted
on every replica; 3, not promoted; 1, the fleet rejected the request; 4, the fleet is unreachable.

After a lost connection, run it again with the same --release: it finds its rollout and follows it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from serve_app.client import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.client.terminal_rollout import rollout_line
from serve_app.rollout.analysis import Analysis, Check, Comparison, Limits, Probe
from serve_app.rollout.plan import CanaryStep, Plan
from serve_app.wire.admin import RolloutView


def plan(adapter: str, *, golden: str | None, hold: str, min_samples: int) -> Plan:
    """A canary that fails on any failed request, or if it is clearly slower than stable."""
    probes: tuple[Probe, ...] = ()
    if golden is not None:
        probe = Probe(
            function="serve_app.probes:agreement",
            options={"file": golden},
            scores={"gain": Limits(min=-0.02)},  # at most two answers in 100 fewer are right
        )
        probes = (probe,)
    return Plan(
        adapter=adapter,
        strategy="canary",
        steps=tuple(
            CanaryStep.model_validate({"weight": weight, "hold": hold}) for weight in (10, 50)
        ),
        analysis=Analysis(
            checks=(
                Check(metric="error_rate", max=0.0),
                Check(metric="time_to_first_token", versus_stable=Comparison()),
                Check(metric="tokens_per_second", versus_stable=Comparison()),
            ),
            probes=probes,
            min_samples=min_samples,
        ),
    )


def follow(client: HotswapClient, rollout: RolloutView) -> RolloutView:
    """Print the rollout whenever it has changed, until it has ended."""
    printed = ""
    for now, _ in client.watch(rollout.id):
        rollout = now
        if (line := rollout_line(rollout).plain) != printed:
            print(printed := line, flush=True)
    return rollout


def print_verdicts(rollout: RolloutView) -> None:
    for verdict in rollout.canary.verdicts if rollout.canary else []:
        print(f"step {verdict.step + 1}, {verdict.weight:g} %: {verdict.outcome}")
        for measurement in verdict.measurements:
            print(f"  {measurement.outcome}: {measurement.why}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="a path, Hub id or URI, as the server resolves it")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--token")
    parser.add_argument("--golden", help="questions with right answers, JSON lines")
    parser.add_argument("--hold", default="1m", help="the length of each step")
    parser.add_argument("--min-samples", type=int, default=30)
    parser.add_argument("--release", help="the idempotency key, such as the job's name")
    given = parser.parse_args(arguments)
    canary = plan(
        given.adapter, golden=given.golden, hold=given.hold, min_samples=given.min_samples
    )
    try:
        with HotswapClient(given.url, token=given.token) as client:
            rollout = follow(client, client.start(canary, key=given.release))
    except RequestRejected as error:
        print(f"rejected: {error.message} [{error.code}]", file=sys.stderr)
        return 1
    except ServerUnreachable as error:
        print(str(error), file=sys.stderr)
        return 4
    print_verdicts(rollout)
    return 0 if rollout.state == "succeeded" else 3


if __name__ == "__main__":
    sys.exit(main())
