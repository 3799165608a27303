"""The model and the adapters of the serving benchmarks, and the number of measurements."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from serve_app.replica import embedded_model as embedded
from serve_app.settings import EMBEDDED, Settings

ADAPTERS = ("pirate", "terse_json", "shakespeare")  # throughput is measured with the first
PAGE_TOKENS = 32  # of the KV cache, as in the engine
REQUEST_TOKENS = 5 * PAGE_TOKENS  # room for the longest prompt and its answer
# 1.1 billion parameters: the shape of TinyLlama, with the embedded model's vocabulary
SHAPE_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SHAPE_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The number of measurements. `tokens`: of each answer, for throughput."""

    rounds: int
    requests: int
    tokens: int
    load_s: float  # of open-loop load, for each policy
    swap_every_s: float
    load_tokens: int
    swaps: int  # of the whole fleet, for each policy
    step_rounds: int
    start_model: str | None  # for the start times; None: the served one


FULL = Effort(
    rounds=3,
    requests=48,
    tokens=32,
    load_s=180,
    swap_every_s=10,
    load_tokens=16,
    swaps=50,
    step_rounds=12,
    start_model=None,
)
QUICK = Effort(
    rounds=1,
    requests=32,
    tokens=8,
    load_s=8,
    swap_every_s=3,
    load_tokens=8,
    swaps=4,
    step_rounds=2,
    start_model="tiny",
)


@dataclass(frozen=True)
class World:
    """`model`: the setting. `base`: its folder. `exact`: True if it has reference answers."""

    model: str
    base: str
    adapters: tuple[Path, ...]
    folder: Path
    effort: Effort
    exact: bool
    compile: bool
    concurrency: int = 32

    @cached_property
    def vocabulary(self) -> int:
        return int(AutoConfig.from_pretrained(self.base).get_text_config().vocab_size)

    @property
    def first(self) -> Path:
        return self.adapters[0]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The defaults of `serve run`, raised where the concurrency needs it."""
        default = Settings()
        needed = self.concurrency * REQUEST_TOKENS
        return {
            "model": self.model,
            "adapter": str(self.first),
            "max_ongoing_requests": max(default.max_ongoing_requests, self.concurrency),
            # by default a lane has room for four of the longest requests
            "kv_cache_tokens": max(4 * default.max_model_len, needed),
            "compile": self.compile,
        }


def cores() -> int:
    return len(os.sched_getaffinity(0))


def model_cores() -> int:
    """Threads for the model, ours and the peer's: one core is left to clients, gateway and proxy.

    Threads of a model wait for each other at every operation. Without that core they would wait
    for the clients, and the benchmark would measure the operating system's scheduler.
    """
    return max(cores() - 1, 1)


def make_world(
    *,
    model: str,
    random_1b: bool,
    folder: Path,
    effort: Effort,
    compile: bool,
) -> World:
    if random_1b:
        model = str(random_model(folder / "random-1b", SHAPE_1B, dtype=torch.bfloat16))
    own = model == EMBEDDED
    base = str(embedded.base_model_path()) if own else model
    adapters = (
        tuple(embedded.ADAPTERS / name for name in ADAPTERS)
        if own
        else random_adapters(base, folder / "adapters")
    )
    return World(
        model=model,
        base=base,
        adapters=adapters,
        folder=folder,
        effort=effort,
        exact=own,
        compile=compile,
    )


def random_model(folder: Path, shape: Mapping[str, int], *, dtype: torch.dtype) -> Path:
    """A Llama with random weights and the embedded model's tokenizer."""
    source = embedded.base_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = transformers.LlamaConfig(
        vocab_size=AutoConfig.from_pretrained(source).vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=4096,
        **shape,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def random_adapters(base: str, folder: Path) -> tuple[Path, ...]:
    """One adapter for each name, of different ranks, all within the default envelope."""
    paths = []
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for rank, name in zip((8, 16, 4), ADAPTERS, strict=True):
        adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
        torch.manual_seed(rank)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.02)
        adapted.save_pretrained(str(folder / name))
        model = adapted.unload()
        paths.append(folder / name)
    return tuple(paths)


def fresh_cache(world: World, name: str) -> Path:
    """A cache folder (`$HOTSWAP_CACHE`) with the model, and without compiled code."""
    folder = world.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if world.model == EMBEDDED:
        (folder / Path(world.base).name).symlink_to(world.base)
    return folder
