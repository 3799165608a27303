"""`make demo`: a fleet under load that changes its adapter three times, and the proof that it did.

Starts the app with `serve run`, swaps pirate → terse_json → shakespeare → undo while clients ask
without a pause, stops everything, then checks every answer against plain PEFT. The last line is
one JSON object. Exit code 0: nothing failed, mismatched or recompiled; 1: something did, or the
demo could not run; 130: stopped by Ctrl-C.
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
from serve_app.client.http import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.client.terminal import rollout_line
from serve_app.replica import embedded_model as embedded
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
                raise DemoFailed(f"some other program took {server.url} meanwhile")
            serving = sum(replica.serving for replica in fleet.replicas)
            if serving == REPLICAS:
                return fleet
            first = not any(embedded.cache_dir().glob("smollm2-*/config.json"))
            work = "converting the model, only on the first run," if first else "loading, compiling"
            screen.doing(f"{work} and warming up: {serving} of {REPLICAS} replicas serve")
        time.sleep(0.5)
    raise DemoFailed(f"not every replica was ready after {START_S:g} s")


def dwell(client: HotswapClient, screen: Screen, load: Load, *, seconds: float) -> None:
    """Stay until every replica has answered on the stable revision. Raises `DemoFailed`."""
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
    """One rollout to its end; `None` is undo. Raises `DemoFailed` when it is not promoted."""
    at = "" if client.base_url == DEFAULT_URL else f" --url {client.base_url}"
    if to is None:
        screen.say(f"$ hotswap{at} undo --watch")
        begun = client.undo()
    else:
        screen.say(f"$ hotswap{at} rollout start --adapter serve_app/adapters/{to} --watch")
        begun = client.start(Plan(adapter=str(embedded.ADAPTERS / to)))
    for rollout, fleet in client.watch(begun.id):
        screen.show(fleet, rollout, load)
        story.saw(fleet.replicas)
    story.rollouts.append((rollout, fleet.replicas))
    screen.say(rollout_line(rollout))
    if rollout.state != "succeeded":
        raise DemoFailed(f"{rollout.id} was not promoted: {rollout.reason}")


def traffic(options: argparse.Namespace, server: Server, screen: Screen, story: Story) -> None:
    """From `serve run` to the last answer."""
    with HotswapClient(server.url) as client:
        with story.timed("start"):
            screen.say(f"$ {server.start()}")
            fleet = wait_ready(server, client, screen)
        screen.say(f"{REPLICAS} replicas serve {fleet.stable}; {options.clients} clients ask")
        load = Load(server.url, clients=options.clients)
        load.start()
        try:
            with story.timed("traffic"):
                dwell(client, screen, load, seconds=options.seconds_per_phase)
                for target in (SECOND, THIRD, None):
                    swap(client, screen, load, story, target)
                    dwell(client, screen, load, seconds=options.seconds_per_phase)
                load.stop()
        finally:  # copies: what fails because the server is being stopped is not the server's fault
            story.answers, story.failures = load.answers.copy(), load.failures.copy()
        screen.say(load.line())
        story.saw(client.fleet().replicas)
        story.complete = True


def judge(screen: Screen, story: Story) -> None:
    """Check every answer, and show what was seen."""
    adapters = [embedded.ADAPTERS / name for name in (FIRST, SECOND, THIRD)]
    expected = {}
    with story.timed("reference"):
        screen.doing("the server is gone; asking plain PEFT the same questions")
        for key, answer in references(embedded.base_model_path(), adapters):
            expected[key] = answer
            screen.doing(f"the server is gone; asking plain PEFT the same questions: {key[0]}")
        found = (mismatch(answer, expected) for answer in story.answers)
        story.mismatches = [why for why in found if why]
    screen.close()
    screen.console.print()
    screen.console.print(answers_table(story, expected))
    screen.console.print(rollouts_table(story))


def _stop_now(signum: int, _frame: FrameType | None) -> None:
    for each in STOPPERS:
        signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not end the cleaning up
    raise SystemExit(128 + signum)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seconds-per-phase", type=float, default=4.0, metavar="S")
    parser.add_argument("--clients", type=int, default=4, metavar="N")
    parser.add_argument("--port", type=int, help=f"default: {PORT}, or any when it is taken")
    parser.add_argument("--json-only", action="store_true", help="print the last line alone")
    return parser.parse_args()


def run(options: argparse.Namespace, server: Server, screen: Screen) -> Story:
    """The whole demo; whatever happens, nothing of the server is left when this ends."""
    story = Story()
    try:
        traffic(options, server, screen, story)
        with story.timed("stop"):
            screen.doing("stopping the server")
            server.stop()
        judge(screen, story)
    except (DemoFailed, RequestRejected, ServerUnreachable) as error:
        story.error = str(error)
        screen.close()
        print(server.tail(), f"error: {error}", f"log: {server.log}", sep="\n", file=sys.stderr)
    except SystemExit:
        screen.close()
        print("stopping everything that was started ...", file=sys.stderr, flush=True)
        server.stop()
        server.forget()
        print("stopped; nothing of it is left", file=sys.stderr)
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
