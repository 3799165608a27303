"""The latency that a slot adds to a model: prepared against not, padded ranks against their own.

``python -m benchmarks.latency [--json PATH] [--rounds N] [--device DEVICE]``

Compiled models, medians. Every round runs each variant once, in random order. ``prompt`` is a
forward pass of 128 tokens, ``token`` one of 1 token. The first table compares PEFT's model with the
same model after `prepare`, with the same adapter at its own rank. The second compares one adapter
of rank 8 in envelopes of higher ranks with the same in an envelope of rank 8: the price of a
``max_rank`` that is never used. `hotswap inspect` prints the cost of padding in bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table

from hotswap_lib import CompileGuard, Envelope, hotswap_adapter, prepare

RANKS = (8, 16, 32, 64, 128)
LENGTHS = {"token": 1, "prompt": 128}
ROUNDS = 120

Run = Callable[[], object]


def build_base(device: str) -> torch.nn.Module:
    """Two layers of a small model's size, so that a LoRA layer costs as much as there."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval().to(device)


def save_adapter(base: torch.nn.Module, folder: Path, rank: int) -> Path:
    model = get_peft_model(
        copy.deepcopy(base).cpu(), LoraConfig(r=rank, target_modules="all-linear")
    )
    torch.manual_seed(rank)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(str(folder))
    return folder


def prepared_over_plain(*, rounds: int, device: str, rank: int = 64) -> dict[str, float]:
    """Length → latency of the prepared model / that of PEFT's, with the same adapter and rank."""
    base = build_base(device)
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(base, Path(folder), rank)
        plain = [PeftModel.from_pretrained(copy.deepcopy(base), str(path)) for _ in range(3)]
        models = {
            "plain": plain[0].eval(),
            # two of them, because the memory layout alone makes equal models differ by some percent
            "plain again": plain[1].eval(),
            "prepared": prepare(plain[2]).model,
        }
    medians = _medians(models, rounds=rounds, device=device)
    return {
        length: 2
        * medians["prepared", length]
        / (medians["plain", length] + medians["plain again", length])
        for length in LENGTHS
    }


def padded_over_own(*, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Highest rank → length → latency / that in an envelope of the adapter's own rank, 8."""
    base = build_base(device)
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(base, Path(folder), RANKS[0])
        for rank in RANKS:
            slot = prepare(copy.deepcopy(base), envelope=Envelope(max_rank=rank))
            hotswap_adapter(slot.model, path)
            models[str(rank)] = slot.model
    own, *others = (str(rank) for rank in RANKS)
    medians = _medians(models, rounds=rounds, device=device)
    return {
        rank: {length: medians[rank, length] / medians[own, length] for length in LENGTHS}
        for rank in others
    }


def _medians(models: dict[str, Any], *, rounds: int, device: str) -> dict[tuple[str, str], float]:
    # to dynamo, all models are the same code, and it limits the compilations of one code
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 2 * len(models) * len(LENGTHS)
    guard = CompileGuard()
    runs: dict[tuple[str, str], Run] = {}
    for name, model in models.items():
        compiled = torch.compile(model, dynamic=False)
        for length, tokens in LENGTHS.items():
            runs[name, length] = _forward(compiled, torch.arange(tokens, device=device)[None])
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    turns, order = list(runs), random.Random(0)
    for turn in range(-3, rounds):  # the first rounds compile and warm up
        order.shuffle(turns)
        if turn == 0:
            assert guard.limit_hits == 0, "some of the models fell back to eager"
            guard.arm()
        for key in turns:
            started = time.perf_counter_ns()
            runs[key]()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn >= 0:
                times[key].append(time.perf_counter_ns() - started)
    guard.check()
    return {key: statistics.median(values) for key, values in times.items()}


def _forward(model: Any, ids: torch.Tensor) -> Run:
    def forward() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    result = {
        "prepared / plain": prepared_over_plain(rounds=asked.rounds, device=asked.device),
        "padded / own": padded_over_own(rounds=asked.rounds, device=asked.device),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if asked.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }
    _show(result, Console())
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("latency, compiled", *LENGTHS)
    table.add_row("prepared / plain, rank 64", *_cells(result["prepared / plain"]))
    for rank, ratios in result["padded / own"].items():
        table.add_row(f"rank 8 in an envelope of {rank} / of 8", *_cells(ratios))
    console.print(table)


def _cells(ratios: dict[str, float]) -> list[str]:
    return [f"{ratios[length]:.3f}" for length in LENGTHS]


if __name__ == "__main__":
    main()
