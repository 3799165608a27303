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
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
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
from serve_app import embedded
from serve_app.client import DEFAULT_URL, HotswapClient, RequestRefused, ServerUnreachable
from serve_app.screen import rollout_line
from serve_app.views import FleetView

ROOT = Path(__file__).resolve().parent.parent
APP = "serve_app.app:build"
PORT = 8000  # the only one that `serve run` takes without a config file
REPLICAS = 2
FIRST, SECOND, THIRD = "pirate", "terse_json", "shakespeare"
ANSWERS_PER_REPLICA = 3  # under each revision, before the next swap
START_S, PHASE_S = 480.0, 180.0
PATIENCE_S: Mapping[int, float] = {signal.SIGINT: 45, signal.SIGTERM: 10, signal.SIGKILL: 10}
STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TAIL_LINES = 40
# What Serve logs when it has given up. With a config file `serve run` itself does not end then.
GAVE_UP = ("Deploying app 'default' failed", "The deployment failed to start")


class DemoFailed(Exception):
    """The demo cannot go on; the message is for whoever started it."""


class Server:
    """`serve run` in a session and a Ray cluster of its own, with all that it starts."""

    def __init__(self, port: int, *, patience_s: Mapping[int, float] = PATIENCE_S) -> None:
        self.url = f"http://127.0.0.1:{port}"
        # in /tmp, because Ray keeps sockets in here, and their names may not be long
        self.folder = Path(tempfile.mkdtemp(prefix="hotswap-", dir="/tmp"))
        self.log = self.folder / "serve.log"
        self._port, self._patience_s = port, patience_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Returns the command as one would type it."""
        # "local" is a new cluster, also where another one runs
        arguments = ["run", "--address", "local", *self._app()]
        self.launch([str(Path(sys.executable).with_name("serve")), *arguments])
        return " ".join(["serve", *arguments])

    def launch(self, command: list[str]) -> None:
        # In a folder of its own, the cluster is not the one that other programs find by default.
        env = os.environ | {"RAY_TMPDIR": str(self.folder), "PYTHONUNBUFFERED": "1"}
        env.pop("RAY_ADDRESS", None)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops this in order
            )

    def check(self) -> None:
        """Raises `DemoFailed` when there is nothing to wait for any more."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise DemoFailed("`serve run` has ended")
        log = self.log.read_text(errors="replace")
        if any(words in log for words in GAVE_UP):
            raise DemoFailed("Ray Serve could not deploy the application")

    def stop(self) -> None:
        """Ask, then insist, until nothing of it is left. Raises `DemoFailed` if something is."""
        if self._process is None:
            return
        for signum, patience_s in self._patience_s.items():
            # a Ctrl-C is for `serve run` alone: it then ends its replicas, and Ray, in order
            pids = [self._process.pid] if signum == signal.SIGINT else self.alive()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)
            deadline = time.monotonic() + patience_s
            while left := self.alive():
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            else:
                self._process = None
                return
        raise DemoFailed(f"these processes do not end: {left}")

    def forget(self) -> None:
        """Remove log and configuration; nobody needs them after a run without trouble."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-TAIL_LINES:])

    def alive(self) -> list[int]:
        """Whoever is in the session. Ray gives workers other process groups, never a session."""
        assert self._process is not None
        self._process.poll()  # or it would stay in the table of processes for ever
        return [pid for pid in psutil.pids() if _session_of(pid) == self._process.pid]

    def _app(self) -> list[str]:
        settings = {
            "model": "embedded",
            "adapter": str(embedded.ADAPTERS / FIRST),
            "replicas": REPLICAS,
            # so that one core, or one GPU, is enough for all of them
            "num_cpus": 1 / REPLICAS,
            "num_gpus": min(1.0, len(list(Path("/dev").glob("nvidia[0-9]*"))) / REPLICAS),
        }
        if self._port == PORT:
            return [APP, *(f"{name}={value}" for name, value in settings.items())]
        config = {
            "http_options": {"host": "127.0.0.1", "port": self._port},
            "applications": [{"name": "default", "import_path": APP, "args": settings}],
        }
        file = self.folder / "serve.yaml"
        file.write_text(json.dumps(config, indent=2))  # JSON is YAML
        return [str(file)]


def _session_of(pid: int) -> int | None:
    with suppress(psutil.Error, OSError):
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return os.getsid(pid)
    return None


def free_port(wanted: int | None) -> int:
    """`wanted`, else Serve's own, else any. Raises `DemoFailed` when `wanted` is taken."""
    for port in [PORT, 0] if wanted is None else [wanted]:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise DemoFailed(f"port {wanted} is taken")


def wait_ready(server: Server, client: HotswapClient, screen: Screen) -> FleetView:
    """The fleet once every replica serves. Raises `DemoFailed`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        server.check()
        try:
            fleet = client.fleet()
        except (ServerUnreachable, RequestRefused):
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
        begun = client.start(adapter=str(embedded.ADAPTERS / to))
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
    parser.add_argument("--seconds-per-phase", type=float, default=12.0, metavar="S")
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
    except (DemoFailed, RequestRefused, ServerUnreachable) as error:
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
