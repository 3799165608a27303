"""The demo: a fleet under constant load swaps its adapter three times; every answer is checked.

    make demo        or, with options: python -m examples.demo --clients 8

Starts the application with `serve run`, swaps pirate → terse_json → shakespeare → undo while
clients send requests without a pause, stops everything, then compares every answer with plain
PEFT's. The last line is one JSON object. Exit code 0: nothing failed, mismatched or recompiled;
1: something did, or the demo could not run; 2: the port is taken; 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from types import FrameType

from rich.console import Console

from examples.demo_load import Load, Screen
from examples.demo_reference import (
    Story,
    answers_table,
    mismatch,
    references,
    rollouts_table,
    summary,
)
from examples.demo_server import FIRST, PORT, REPLICAS, DemoFailed, Server, free_port
from serve_app.client import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.client.terminal_rollout import rollout_line
from serve_app.replica.embedded_model import ADAPTERS, base_model_path, cache_dir
from serve_app.rollout.plan import Plan
from serve_app.wire.admin import FleetView

SECOND, THIRD = "terse_json", "shakespeare"
ANSWERS_PER_REPLICA = 3  # under each revision, before the next swap
START_S, PHASE_S = 480.0, 180.0
STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def wait_ready(server: Server, client: HotswapClient, screen: Screen) -> FleetView:
    """The fleet once every replica serves. Raises `DemoFailed`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        server.check()
        try:
            fleet = client.fleet()
        except (ServerUnreachable, RequestRejected):
            screen.doing("starting Ray, Serve and the controller")
        else:
            if not fleet.journal_uri.startswith(str(server.folder)):
                raise DemoFailed(f"another program has taken {server.url} in the meantime")
            serving = sum(replica.serving for replica in fleet.replicas)
            if serving == REPLICAS:
                return fleet
            first = not any(cache_dir().glob("smollm2-*/config.json"))
            work = "converting the model, only on the first run," if first else "loading, compiling"
            screen.doing(f"{work} and warming up: {serving} of {REPLICAS} replicas serve")
        time.sleep(0.5)
    raise DemoFailed(f"not every replica was ready after {START_S:g} s")


def dwell(client: HotswapClient, screen: Screen, load: Load, *, seconds: float) -> None:
    """Wait until every replica has answered on the stable revision. Raises `DemoFailed`."""
    began_at = time.time()
    for fleet in client.watch_fleet(period_s=0.5):
        screen.show(fleet, None, load)
        answered = load.answered_since(fleet.stable, began_at)
        enough = all(answered[each.id] >= ANSWERS_PER_REPLICA for each in fleet.replicas)
        if enough and time.time() - began_at >= seconds:
            return
        if time.time() - began_at >= seconds + PHASE_S:
            raise DemoFailed(f"the replicas answered only {dict(answered)} on {fleet.stable}")


def swap(client: HotswapClient, screen: Screen, load: Load, story: Story, to: str | None) -> None:
    """Run one rollout to its end; `to=None` is undo. Raises `DemoFailed` if it is not promoted."""
    at = "" if client.base_url == DEFAULT_URL else f" --url {client.base_url}"
    if to is None:
        screen.say(f"$ hotswap{at} undo --watch")
        started = client.undo()
    else:
        screen.say(f"$ hotswap{at} rollout start --adapter serve_app/adapters/{to} --watch")
        started = client.start(Plan(adapter=str(ADAPTERS / to)))
    for rollout, fleet in client.watch(started.id):
        screen.show(fleet, rollout, load)
        story.record(fleet.replicas)
    story.rollouts.append((rollout, fleet.replicas))
    screen.say(rollout_line(rollout))
    if rollout.state != "succeeded":
        raise DemoFailed(f"{rollout.id} was not promoted: {rollout.reason}")


def traffic(options: argparse.Namespace, server: Server, screen: Screen, story: Story) -> None:
    """Start the server, send requests through three swaps, and record the answers."""
    with HotswapClient(server.url) as client:
        with story.timed("start"):
            screen.say(f"$ {server.start()}")
            fleet = wait_ready(server, client, screen)
        screen.say(
            f"{REPLICAS} replicas serve {fleet.stable}; {options.clients} clients send requests"
        )
        load = Load(server.url, clients=options.clients)
        load.start()
        try:
            with story.timed("traffic"):
                dwell(client, screen, load, seconds=options.seconds_per_phase)
                for target in (SECOND, THIRD, None):
                    swap(client, screen, load, story, target)
                    dwell(client, screen, load, seconds=options.seconds_per_phase)
                load.stop()
        finally:  # copies, without the requests that fail because the server is being stopped
            story.answers, story.failures = load.answers.copy(), load.failures.copy()
        screen.say(load.line())
        story.record(client.fleet().replicas)
        story.complete = True


def check_answers(screen: Screen, story: Story) -> None:
    """Check every answer, and print the tables."""
    adapters = [ADAPTERS / name for name in (FIRST, SECOND, THIRD)]
    expected = {}
    with story.timed("reference"):
        screen.doing("the server has stopped; sending the same questions to plain PEFT")
        for key, answer in references(base_model_path(), adapters):
            expected[key] = answer
            screen.doing(f"the server has stopped; sending the questions to plain PEFT: {key[0]}")
        found = (mismatch(answer, expected) for answer in story.answers)
        story.mismatches = [why for why in found if why]
    screen.close()
    screen.console.print()
    screen.console.print(answers_table(story, expected))
    screen.console.print(rollouts_table(story))


def _stop_now(signum: int, _frame: FrameType | None) -> None:
    for each in STOPPERS:
        signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
    raise SystemExit(128 + signum)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seconds-per-phase", type=float, default=4.0, metavar="S")
    parser.add_argument("--clients", type=int, default=4, metavar="N")
    parser.add_argument(
        "--port", type=int, help=f"default: {PORT}, or any free port if it is taken"
    )
    parser.add_argument("--json-only", action="store_true", help="print only the last line")
    return parser.parse_args()


def run(options: argparse.Namespace, server: Server, screen: Screen) -> Story:
    """The whole demo. No process of the server is left afterwards, even after an error."""
    story = Story()
    try:
        traffic(options, server, screen, story)
        with story.timed("stop"):
            screen.doing("stopping the server")
            server.stop()
        check_answers(screen, story)
    except (DemoFailed, RequestRejected, ServerUnreachable) as error:
        story.error = str(error)
        screen.close()
        print(server.tail(), f"error: {error}", f"log: {server.log}", sep="\n", file=sys.stderr)
    except SystemExit:
        screen.close()
        print("stopping the server ...", file=sys.stderr, flush=True)
        server.stop()
        server.forget()
        print("stopped; no process is left", file=sys.stderr)
        raise
    finally:
        screen.close()
        server.stop()
    if story.error is None:
        server.forget()
    return story


def main() -> int:
    options = parse_args()
    for signum in STOPPERS:
        signal.signal(signum, _stop_now)
    try:
        server = Server(free_port(options.port))
    except DemoFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with open(os.devnull, "w") as nowhere:
        screen = Screen(Console(file=nowhere if options.json_only else None))
        story = run(options, server, screen)
    print(json.dumps(summary(story)))
    return 0 if story.ok else 1


if __name__ == "__main__":
    sys.exit(main())
