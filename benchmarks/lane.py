"""The cost of the control loop at rest: CPU of replicas and controller without requests.

`python -m benchmarks.lane [--json PATH] [--seconds 20] [--replicas 2]`

Deploys the embedded model twice, with reports every 2 s (the default) and with reports every 60 s
(practically none), and reads the CPU time of each process over the same span from the operating
system. The difference is the cost of the reports. Prints percent of one core.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import ray
from ray import serve
from rich.console import Console
from rich.table import Table

from serve_app.app import build
from serve_app.client.http import HotswapClient

APP = "lane"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        rest = {
            poll_s: _measure(port, poll_s=poll_s, replicas=asked.replicas, seconds=asked.seconds)
            for poll_s in (2.0, 60.0)
        }
    finally:
        serve.shutdown()
        ray.shutdown()
    _show(rest, asked.json)


def _measure(port: int, *, poll_s: float, replicas: int, seconds: float) -> dict[str, float]:
    """Percent of one core for a replica (the mean) and for the controller, over `seconds`."""
    settings = {"replicas": replicas, "num_cpus": 0.1, "compile": False, "poll_s": poll_s}
    serve.run(build(settings), name=APP, route_prefix=f"/{APP}")
    with HotswapClient(f"http://127.0.0.1:{port}/{APP}") as client:
        pids = [r.pid for r in client.fleet().replicas if r.pid is not None]
    workers = [psutil.Process(pid) for pid in pids]
    controller = _controller()
    time.sleep(5)  # until the work of the start is done
    before = [_cpu_s(p) for p in [*workers, controller]]
    time.sleep(seconds)
    after = [_cpu_s(p) for p in [*workers, controller]]
    percent = [100 * (b - a) / seconds for a, b in zip(before, after, strict=True)]
    serve.delete(APP)
    return {"replica": sum(percent[:-1]) / len(workers), "controller": percent[-1]}


def _controller() -> psutil.Process:
    title = f"ServeReplica:{APP}:RolloutController"
    return next(p for p in psutil.process_iter(["cmdline"]) if title in _title(p))


def _title(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _show(rest: dict[float, dict[str, float]], path: Path | None) -> None:
    table = Table(title="CPU at rest, percent of one core")
    for heading in ("process", "reports every 2 s", "every 60 s", "the reports"):
        table.add_column(heading, justify="right")
    cost = {}
    for name in ("replica", "controller"):
        with_lane, without = rest[2.0][name], rest[60.0][name]
        cost[name] = with_lane - without
        table.add_row(name, f"{with_lane:.2f}", f"{without:.2f}", f"{cost[name]:.2f}")
    Console().print(table)
    if path is not None:
        result = {"at_rest_percent": rest, "lane_percent": cost, "ray": version("ray")}
        path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
