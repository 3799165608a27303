"""Throughput, latency and correctness of the whole application, each compared with its peer.

``python -m benchmarks.serving [--json [PATH]] [--quick] [--only ROW ...]``

Throughput is measured in a closed loop with prompts of 24 to 100 random tokens, greedy, on the
embedded model: through a Serve handle against transformers' own continuous batching over an
unprepared PEFT model, over HTTP against the handle, with a canary against without. Latency is
measured in an open loop over HTTP: requests that met a rolling swap against requests of the same
run that met none. Every answer during swaps is compared with plain PEFT. Then, in one process: the
throughput against merged weights, the time of a step with and without compilation, and the start of
a replica with and without a compile cache.

All seeds are fixed, everything is warmed up, and compared variants alternate. The exit code is 1 if
a request failed, an answer was wrong or a row could not be measured, else 0: a missed bar may be
the fault of a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from benchmarks import serving_inside as inside
from benchmarks.serving_figures import Figure
from benchmarks.serving_fleet import fleet, leave_in_order
from benchmarks.serving_swaps import swaps
from benchmarks.serving_throughput import RATIOS, throughput
from benchmarks.serving_world import (
    FULL,
    QUICK,
    SHAPE_TINY,
    World,
    cores,
    fresh_cache,
    make_world,
    random_adapters,
    random_model,
)
from serve_app.settings import EMBEDDED

PACKAGES = ("torch", "transformers", "peft", "ray")
COLORS = {"held": "green", "missed": "yellow", "reported": "dim", "failed": "bold red"}


def starts(world: World) -> Iterator[Figure]:
    """The start of a replica, with an empty and with a filled compile cache."""
    own = replace(world, **_tiny(world)) if world.effort.start_model else world
    uri = world.folder / "shared-compiled"
    measured = {}
    for state in ("empty", "filled"):
        cache = fresh_cache(own, f"cache-{state}")  # as on another node
        given = {"replicas": 1, "torch_threads": cores(), "compile_cache_uri": str(uri)}
        with fleet(own, cache=cache, **given) as running:
            [measured[state]] = running.starts()
    empty, filled = measured["empty"], measured["filled"]
    yield Figure(
        name="warm-up of a replica, filled / empty compile cache",
        value=filled.warm_up_s / empty.warm_up_s,
        unit="x",
        says=f"{filled.warm_up_s:.1f} s ({filled.compile_cache}) / {empty.warm_up_s:.1f} s "
        f"({empty.compile_cache}); loading {filled.load_s:.1f} / {empty.load_s:.1f} s"
        + (", a tiny model" if own is not world else ""),
        detail={state: start.model_dump() for state, start in measured.items()},
    )


def _tiny(world: World) -> dict[str, Any]:
    model = str(random_model(world.folder / "tiny", SHAPE_TINY, dtype=torch.float32))
    adapters = random_adapters(model, world.folder / "tiny-adapters")
    return {"model": model, "base": model, "adapters": adapters}


Rows = Callable[[World, Sequence[str]], Iterator[Figure]]


def _one(row: Callable[[World], Iterator[Figure]]) -> Rows:
    return lambda world, _: row(world)


# Rows that share a fleet are measured together.
GROUPS: tuple[tuple[tuple[str, ...], Rows], ...] = (
    (tuple(RATIOS), throughput),
    (("overlap", "drain", "exact"), swaps),
    (("lanes",), _one(inside.lanes)),
    (("merged",), _one(inside.merged)),
    (("steps",), _one(inside.steps)),
    (("starts",), _one(starts)),
)
NAMES = tuple(row for names, _ in GROUPS for row in names)


def run(world: World, only: Sequence[str], console: Console) -> tuple[list[Figure], list[str]]:
    """The figures, and the errors of rows that could not be measured."""
    figures: list[Figure] = []
    broken: list[str] = []
    began = time.monotonic()
    for names, rows in GROUPS:
        if not (wanted := [name for name in names if name in only]):
            continue
        console.print(f"{time.monotonic() - began:6.0f} s  {', '.join(wanted)}", style="dim")
        try:
            figures += rows(world, wanted)
        except Exception as error:  # the other rows do not depend on these
            console.print_exception()
            broken.append(f"{', '.join(wanted)}: {type(error).__name__}: {error}")
    return figures, broken


def failed(figure: Figure) -> bool:
    return figure.fails and figure.verdict == "missed"


def show(figures: Sequence[Figure], broken: Sequence[str], console: Console) -> None:
    table = Table("figure", "bar", "measured", "verdict")
    for figure in figures:
        verdict = "failed" if failed(figure) else figure.verdict
        value = f"{figure.value:g}" if figure.fails else f"{figure.value:.2f} {figure.unit}"
        name = Text(figure.name)
        if figure.says:
            name.append(f"\n{figure.says}", style="dim")
        table.add_row(name, figure.bar or "", value.strip(), Text(verdict, style=COLORS[verdict]))
    console.print(table)
    for why in broken:
        console.print(f"not measured: {why}", style="bold red", markup=False)


def document(
    world: World, figures: Sequence[Figure], broken: Sequence[str], *, took_s: float
) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "figures": [
            {
                "name": each.name,
                # JSON has no nan
                "value": round(each.value, 4) if math.isfinite(each.value) else None,
                "unit": each.unit,
                "bar": each.bar,
                "verdict": "failed" if failed(each) else each.verdict,
                "says": each.says,
                "detail": each.detail,
            }
            for each in figures
        ],
        "not measured": list(broken),
        # no path of this machine
        "settings": {**world.settings, "adapter": Path(str(world.settings["adapter"])).name},
        "concurrency": world.concurrency,
        "effort": asdict(world.effort),
        "device": torch.cuda.get_device_name() if gpu else _cpu(),
        "cuda": torch.version.cuda if gpu else None,
        "cores": cores(),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load_average": os.getloadavg(),
        "took_s": round(took_s),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="PATH", help="the result as JSON, here or on stdout"
    )
    parser.add_argument("--quick", action="store_true", help="every row, with few samples")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="ROW")
    parser.add_argument("--model", default=EMBEDDED, help="another model, with random adapters")
    parser.add_argument("--random-1b", action="store_true", help="1.1 B random weights, bfloat16")
    parser.add_argument("--eager", action="store_true", help="without compilation, for a quick try")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", help="default: 32, and on a GPU also 128"
    )
    return parser.parse_args()


def main() -> None:
    asked = _arguments()
    leave_in_order()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = Console(stderr=asked.json == "-")
    # throughput is measured at each level, the other rows at the last alone
    levels = asked.concurrency or ([128, 32] if torch.cuda.is_available() else [32])
    began = time.monotonic()
    figures, broken = [], []
    folders = tempfile.TemporaryDirectory(prefix="hotswap-bench-")
    # Ray prints about a Serve that was shut down, and standard output is for the result
    with folders as folder, contextlib.redirect_stdout(sys.stderr):
        world = make_world(
            model=asked.model,
            random_1b=asked.random_1b,
            folder=Path(folder),
            effort=QUICK if asked.quick else FULL,
            compile=not asked.eager,
        )
        for clients in levels:
            world = replace(world, concurrency=clients)
            last = clients == levels[-1]
            only = [row for row in asked.only if last or row in RATIOS]
            more, errors = run(world, only, console)
            figures += more
            broken += errors
    show(figures, broken, console)
    result = document(world, figures, broken, took_s=time.monotonic() - began)
    console.print(f"{result['device']}, {result['cores']} cores, {result['took_s']} s")
    console.print(", ".join(f"{name} {of}" for name, of in result["versions"].items()))
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if asked.json == "-":
        print(text)
    elif asked.json:
        Path(asked.json).write_text(text + "\n")
    sys.exit(1 if broken or any(map(failed, figures)) else 0)


if __name__ == "__main__":
    main()
