"""The cost of a swap, compared with one raw copy of the same bytes and with PEFT's own hot-swap.

``python -m benchmarks.swap [--json [PATH]] [--rounds N] [--swaps N] [--device DEVICE]``

All figures come from one run and are medians. Every round runs the operations in a new random
order, because the previous operation leaves the caches cold or warm, and uses the next adapter.
224 LoRA layers, an image of 42 MB in float32 at rank 64, adapters of ranks 8, 16, 32 and 64. PEFT's
model is prepared and compiled as its documentation says. On CUDA the times are the device's own,
between two events. Then: the steps of a swap from disk, the growth of memory after a thousand
swaps, and the latency of a compiled model after `prepare` against before.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig
from peft.utils import hotswap as peft_hotswap
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict
from rich.console import Console
from rich.table import Table

from benchmarks.latency import prepared_over_plain
from benchmarks.memory import growth_images
from benchmarks.steps import breakdown
from benchmarks.workload import MAX_RANK, RANKS, build_base, save_adapters
from hotswap_lib import Adapter, Envelope, Slot, load_adapter, pack, prepare

# these take milliseconds, and run more often, so that their medians are as precise
COPIES = ("raw copy_ of the same bytes", "commit", "rollback")
COPIES_PER_ROUND = 5

Operation = Callable[[int], object]
"""One measured operation; the argument is the round, which selects the adapter."""


def our_operations(slot: Slot, paths: list[Path]) -> dict[str, Operation]:
    adapters = [load_adapter(path) for path in paths]
    images = [pack(adapter, slot.layout) for adapter in adapters]
    staged = [slot.stage(image) for image in images]
    raw = [[block.clone() for block in one.blocks] for one in staged]
    target = [torch.empty_like(block) for block in raw[0]]

    def copy_raw(turn: int) -> None:
        for to, block in zip(target, raw[turn % len(raw)], strict=True):
            to.copy_(block)

    def swap_from_disk(turn: int) -> object:
        image = pack(paths[turn % len(paths)], slot.layout)
        return slot.commit(slot.stage(image))

    return {
        "raw copy_ of the same bytes": copy_raw,
        "commit": lambda turn: slot.commit(staged[turn % len(staged)]),
        "rollback": lambda _: slot.rollback(),
        "read and identify (from disk)": lambda turn: load_adapter(paths[turn % len(paths)]),
        "pack (from memory)": lambda turn: pack(adapters[turn % len(paths)], slot.layout),
        "stage": lambda turn: slot.stage(images[turn % len(images)]),
        "pack + stage + commit from disk": swap_from_disk,
    }


def peft_operations(base: torch.nn.Module, paths: list[Path], device: str) -> dict[str, Operation]:
    prepared = peft.PeftModel.from_pretrained(base, str(paths[-1])).eval()
    peft_hotswap.prepare_model_for_compiled_hotswap(prepared, target_rank=MAX_RANK)
    model: Any = torch.compile(prepared)
    configs = [LoraConfig.from_pretrained(str(path)) for path in paths]
    states = [_in_memory(load_adapter(path), device) for path in paths]

    def from_state_dict(turn: int) -> None:
        which = turn % len(paths)
        peft_hotswap.hotswap_adapter_from_state_dict(
            model, states[which], "default", configs[which]
        )

    def from_disk(turn: int) -> None:
        path = str(paths[turn % len(paths)])
        peft_hotswap.hotswap_adapter(model, path, "default", torch_device=device)

    return {
        "PEFT hotswap_adapter_from_state_dict": from_state_dict,
        "PEFT hotswap_adapter from disk": from_disk,
    }


def _in_memory(adapter: Adapter, device: str) -> dict[str, torch.Tensor]:
    """The tensors with the keys that `hotswap_adapter_from_state_dict` expects.

    PEFT renames keys with a private function alone; its own `hotswap_adapter` calls it, too.
    """
    tensors = {key: tensor.to(device) for key, tensor in adapter.tensors.items()}
    state: dict[str, torch.Tensor] = _insert_adapter_name_into_state_dict(
        tensors, "default", "lora_"
    )
    return state


def measure(operations: dict[str, Operation], *, rounds: int, device: str) -> dict[str, float]:
    """Median microseconds for each operation; every round runs all of them."""
    times: dict[str, list[float]] = {name: [] for name in operations}
    order = random.Random(0)
    turns = [name for name in operations for _ in range(COPIES_PER_ROUND if name in COPIES else 1)]
    for turn in range(-1, rounds):  # the first round is a warm-up
        order.shuffle(turns)
        for name in turns:
            took_us = _time_us(operations[name], turn, device)
            if turn >= 0:
                times[name].append(took_us)
    return {name: statistics.median(values) for name, values in times.items()}


def _time_us(operation: Operation, turn: int, device: str) -> float:
    if not device.startswith("cuda"):
        started = time.perf_counter_ns()
        operation(turn)
        return (time.perf_counter_ns() - started) / 1e3
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    operation(turn)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def ratios(median_us: dict[str, float]) -> dict[str, float]:
    commit = median_us["commit"]
    disk = median_us["pack + stage + commit from disk"]
    return {
        "commit / raw copy_": commit / median_us["raw copy_ of the same bytes"],
        "rollback / commit": median_us["rollback"] / commit,
        "PEFT state dict / commit": median_us["PEFT hotswap_adapter_from_state_dict"] / commit,
        "ours from disk / PEFT from disk": disk / median_us["PEFT hotswap_adapter from disk"],
    }


# The bar of each ratio, by kind of device.
BARS: dict[str, dict[str, str]] = {
    "commit / raw copy_": {"cpu": "≤ 1.25", "cuda": "≤ 1.25"},
    "rollback / commit": {"cpu": "≤ 1.1", "cuda": "≤ 1.1"},
    "PEFT state dict / commit": {"cpu": "≥ 50", "cuda": "≥ 100"},
    "ours from disk / PEFT from disk": {"cpu": "≤ 0.5", "cuda": "≤ 0.5"},
    "latency prepared / plain, token": {"cpu": "≤ 1.02", "cuda": "≤ 1.02"},
    "latency prepared / plain, prompt": {"cpu": "≤ 1.02", "cuda": "≤ 1.02"},
}


def run(*, rounds: int, swaps: int, device: str) -> dict[str, Any]:
    base = build_base(device)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(base, Path(folder))
        theirs = peft_operations(copy.deepcopy(base), paths, device)
        slot = prepare(base, envelope=Envelope(max_rank=MAX_RANK))
        slot.commit(
            slot.stage(pack(paths[0], slot.layout))
        )  # for a rollback before the first commit
        ours = our_operations(slot, paths)
        median_us = measure({**ours, **theirs}, rounds=rounds, device=device)
        slot.verify()
        steps_us = breakdown(slot, paths, rounds=rounds)
        growth = growth_images(slot, paths, swaps=swaps)
    latency = prepared_over_plain(rounds=30 * rounds, device=device)
    measured = ratios(median_us)
    measured |= {f"latency prepared / plain, {length}": r for length, r in latency.items()}
    return {
        "image_bytes": slot.layout.nbytes,
        "lora_layers": sum(entry.is_scaling for entry in slot.layout.entries),
        "ranks": list(RANKS),
        "rounds": rounds,
        "median_us": median_us,
        "steps_us": steps_us,
        "ratios": measured,
        "swaps": swaps,
        "growth_images": growth,
        "versions": {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    commit = result["median_us"]["commit"]
    megabytes = result["image_bytes"] / 1e6
    title = f"{result['lora_layers']} LoRA layers, {megabytes:.0f} MB image, {result['device']}"
    table = Table("operation", "median", "/ commit", title=title)
    for name, took_us in result["median_us"].items():
        if name.startswith("PEFT"):
            name = name.replace("PEFT", f"PEFT {result['versions']['peft']}")
        table.add_row(name, f"{took_us / 1e3:.2f} ms", f"{took_us / commit:.2f}")
    console.print(table)
    table = Table("a swap from disk", "median")
    for step, took_us in result["steps_us"].items():
        table.add_row(step, f"{took_us / 1e3:.2f} ms")
    console.print(table)
    kind = "cpu" if result["device"] == "cpu" else "cuda"
    table = Table("ratio", "measured", "bar")
    for name, value in result["ratios"].items():
        table.add_row(name, f"{value:.3f}", BARS[name][kind])
    growth = f"{result['growth_images']:.3f} images"
    table.add_row(f"memory left by {result['swaps']} swaps", growth, "noise")
    console.print(table)
    console.print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="PATH", help="the result as JSON, here or on stdout"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    result = run(rounds=asked.rounds, swaps=asked.swaps, device=asked.device)
    document = json.dumps(result, indent=2)
    show(result, Console(stderr=asked.json == "-"))
    if asked.json == "-":
        print(document)
    elif asked.json:
        Path(asked.json).write_text(document + "\n")


if __name__ == "__main__":
    main()
