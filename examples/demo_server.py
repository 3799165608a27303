"""The server of the demo: `serve run` in its own Ray cluster, and the end of all its processes."""

from __future__ import annotations

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

import psutil

from serve_app.replica.embedded_model import ADAPTERS

ROOT = Path(__file__).resolve().parent.parent
APP = "serve_app.app:build"
PORT = 8000  # the only one that `serve run` takes without a config file
REPLICAS = 2
FIRST = "pirate"
PATIENCE_S: Mapping[int, float] = {signal.SIGINT: 45, signal.SIGTERM: 10, signal.SIGKILL: 10}
TAIL_LINES = 40
# Serve logs these when it has given up. With a config file, `serve run` does not end then.
GAVE_UP = ("Deploying app 'default' failed", "The deployment failed to start")


class DemoFailed(Exception):
    """The demo cannot continue; the message is for its user."""


class Server:
    """`serve run` and all that it starts, in their own process session and Ray cluster."""

    def __init__(self, port: int, *, patience_s: Mapping[int, float] = PATIENCE_S) -> None:
        self.url = f"http://127.0.0.1:{port}"
        # in /tmp, because Ray puts sockets here, and the names of sockets must be short
        self.folder = Path(tempfile.mkdtemp(prefix="hotswap-", dir="/tmp"))
        self.log = self.folder / "serve.log"
        self._port, self._patience_s = port, patience_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Returns the command line."""
        # "local" is a new cluster, even if another one runs
        arguments = ["run", "--address", "local", *self._app()]
        self.launch([str(Path(sys.executable).with_name("serve")), *arguments])
        return " ".join(["serve", *arguments])

    def launch(self, command: list[str]) -> None:
        # In its own folder, the cluster is not the one that other programs find by default.
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
        """Raises `DemoFailed` if the server has ended or will never be ready."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise DemoFailed("`serve run` has ended")
        log = self.log.read_text(errors="replace")
        if any(words in log for words in GAVE_UP):
            raise DemoFailed("Ray Serve could not deploy the application")

    def stop(self) -> None:
        """Interrupt, terminate, then kill the processes. Raises `DemoFailed` if one is left."""
        if self._process is None:
            return
        for signum, patience_s in self._patience_s.items():
            # SIGINT goes to `serve run` alone: it then stops its replicas, and Ray, in order
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
                self._process.wait(timeout=10)  # reads its exit status
                self._process = None
                return
        raise DemoFailed(f"these processes do not end: {left}")

    def forget(self) -> None:
        """Remove the log and the configuration, which are of no use after a successful run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-TAIL_LINES:])

    def alive(self) -> list[int]:
        """The processes of the session. Ray starts workers in other groups, never in a session."""
        assert self._process is not None
        self._process.poll()  # or it would remain as a zombie
        return [pid for pid in psutil.pids() if _session_of(pid) == self._process.pid]

    def _app(self) -> list[str]:
        settings = {
            "model": "embedded",
            "adapter": str(ADAPTERS / FIRST),
            "replicas": REPLICAS,
            # so that one core, or one GPU, is enough for all replicas
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
    """`wanted`; if None, Serve's own port or any free one. `DemoFailed` if `wanted` is taken."""
    for port in [PORT, 0] if wanted is None else [wanted]:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise DemoFailed(f"port {wanted} is taken")
