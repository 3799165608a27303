"""What a release job runs: one adapter, the whole cluster, step by step, and an exit code.

    python -m examples.canary_release ./adapters/support-bot-v7 --golden golden.jsonl

The fleet gets the adapter as a canary: a tenth of the requests, then half of them, then all. Each
step has to pass its analysis, and one that fails is taken back by the fleet itself, also when this
script is gone. The exit code is 0 when the adapter was promoted on every replica, 3 when it was
not, 1 when the fleet refused it, 4 when the fleet could not be reached.

Run it again with the same --release, after a lost connection say, and it finds its rollout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from serve_app.client.http import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.client.terminal import rollout_line
from serve_app.rollout.analysis import Analysis, Check, Comparison, Limits, Probe
from serve_app.rollout.plan import CanaryStep, Plan


def plan(adapter: str, *, golden: str | None, hold: str, min_samples: int) -> Plan:
    """No request on the canary may fail, and it may not be clearly slower than stable."""
    probes: tuple[Probe, ...] = ()
    if golden is not None:
        probe = Probe(
            function="serve_app.probes:agreement",
            options={"file": golden},
            scores={"gain": Limits(min=-0.02)},  # as right as stable, two answers in 100 aside
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="a path, Hub id or URI, as the server resolves it")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--token")
    parser.add_argument("--golden", help="questions with right answers, JSON lines")
    parser.add_argument("--hold", default="1m", help="how long each step is watched")
    parser.add_argument("--min-samples", type=int, default=30)
    parser.add_argument("--release", help="the job's own name for this release")
    given = parser.parse_args(arguments)
    asked = plan(given.adapter, golden=given.golden, hold=given.hold, min_samples=given.min_samples)
    try:
        with HotswapClient(given.url, token=given.token) as client:
            rollout = client.start(asked, key=given.release)
            told = ""
            for now, _ in client.watch(rollout.id):
                rollout = now
                if (line := rollout_line(rollout).plain) != told:
                    print(told := line, flush=True)
    except RequestRejected as refused:
        print(f"refused: {refused.message} [{refused.code}]", file=sys.stderr)
        return 1
    except ServerUnreachable as away:
        print(str(away), file=sys.stderr)
        return 4
    for verdict in rollout.canary.verdicts if rollout.canary else []:
        print(f"step {verdict.step + 1}, {verdict.weight:g} %: {verdict.outcome}")
        for seen in verdict.measurements:
            print(f"  {seen.outcome}: {seen.why}")
    return 0 if rollout.state == "succeeded" else 3


if __name__ == "__main__":
    sys.exit(main())
