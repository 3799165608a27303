"""The memory that a swap takes beyond the memory at rest, in images.

`python -m benchmarks.memory [--json PATH] [--swaps 40]`

One process does the controller's part (load and pack), then a replica's (stage and commit), while
a thread samples its unique set size. At rest it holds the slot, the live and the previous image.
The bar: at most two more images at any moment, and no growth after many swaps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.workload import MAX_RANK, build_base, save_adapters
from hotswap_lib import Envelope, Slot, pack, prepare

_M_MMAP_THRESHOLD = -3  # malloc.h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    _return_freed_memory()
    base = build_base("cpu")
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(base, Path(folder))
        slot = prepare(base, envelope=Envelope(max_rank=MAX_RANK))
        for path in paths * 2:
            slot.commit(slot.stage(pack(path, slot.layout)))
        result = _measure(slot, paths, swaps=asked.swaps)
    _show(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


def growth_images(slot: Slot, paths: list[Path], *, swaps: int) -> float:
    """The growth of memory after this many swaps from disk, in images of the slot."""
    _return_freed_memory()
    for path in paths * 2:  # one-time allocations happen here
        slot.commit(slot.stage(pack(path, slot.layout)))
    rest = _uss_at_rest()
    for turn in range(swaps - swaps % len(paths)):  # the last round is complete
        slot.commit(slot.stage(pack(paths[turn % len(paths)], slot.layout)))
    return (_uss_at_rest() - rest) / slot.layout.nbytes


def _return_freed_memory() -> None:
    # malloc returns large blocks to the system when they are freed, so that USS does not count them
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _measure(slot: Slot, paths: list[Path], *, swaps: int) -> dict[str, float]:
    image_bytes = slot.layout.nbytes
    biggest = paths[-1]  # at the envelope's own rank, so without padding
    rest = _uss_at_rest()
    with _peak() as controller:
        image = pack(biggest, slot.layout)
    received = _uss_at_rest()  # in a fleet this image is in shared memory, once for each node
    with _peak() as replica:
        slot.commit(slot.stage(image))
    del image
    for turn in range(swaps - swaps % len(paths)):  # the last round is complete
        slot.commit(slot.stage(pack(paths[turn % len(paths)], slot.layout)))
    return {
        "image_mb": image_bytes / 1e6,
        "swaps": swaps,
        "controller_peak_images": (max(controller) - rest) / image_bytes,
        "replica_peak_images": (max(replica) - received) / image_bytes,
        "left_after_all_swaps_images": (_uss_at_rest() - rest) / image_bytes,
    }


@contextmanager
def _peak() -> Iterator[list[int]]:
    samples = [_uss()]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.001):
            samples.append(_uss())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _uss_at_rest() -> int:
    """After returning freed memory to the system, so that it does not hide later allocations."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _uss()


def _uss() -> int:
    return int(psutil.Process().memory_full_info().uss)


def _show(result: dict[str, float]) -> None:
    table = Table("memory beyond rest", "images", title=f"{result['image_mb']:.0f} MB image, CPU")
    table.add_row("controller: load and pack", f"{result['controller_peak_images']:.2f}")
    table.add_row("replica: stage and commit", f"{result['replica_peak_images']:.2f}")
    table.add_row(
        f"left after {result['swaps']:g} swaps", f"{result['left_after_all_swaps_images']:.2f}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
