"""The peer: transformers' own continuous batching over an unprepared PEFT model or a merged one.

``python -m benchmarks.serving_bare`` runs one in its own process, like a replica: the first line on
standard input is the model (`Bare`), each further line has prompts, and standard output has a line
for each. It sleeps in between.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.utils import logging

from benchmarks.serving_world import PAGE_TOKENS, World
from serve_app.settings import parse

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """Model and sizes of a bare manager: the engine's own sizes, else transformers' defaults."""

    base: str
    adapter: str
    threads: int
    cache_tokens: int
    batch_tokens: int
    requests: int


def bare(world: World, *, threads: int) -> Bare:
    settings = parse(dict(world.settings))
    return Bare(
        base=world.base,
        adapter=str(world.first),
        threads=threads,
        cache_tokens=world.settings["kv_cache_tokens"],
        batch_tokens=settings.max_batch_tokens,
        requests=settings.max_ongoing_requests,
    )


def plain_peft(what: Bare) -> Any:
    """PEFT's model at the adapter's own rank, neither prepared nor compiled."""
    base = AutoModelForCausalLM.from_pretrained(what.base, dtype="auto", attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, what.adapter).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def manager_of(
    model: Any, what: Bare, kind: type[Any] = ContinuousBatchingManager
) -> Any:  # ContinuousBatchingManager
    """A manager over a merged model, or over the model inside a PEFT model."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    eos = inner.generation_config.eos_token_id
    return kind(
        model=inner,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=256, eos_token_id=-1 if eos is None else eos
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-what.cache_tokens // PAGE_TOKENS),
            max_batch_tokens=what.batch_tokens,
            max_requests_per_batch=what.requests,
        ),
    )


def saturate(
    manager: Any, asked: Sequence[list[int]], *, clients: int, max_tokens: int
) -> dict[str, float]:
    """Closed loop: each of `clients` sends the next prompt after its answer. Tokens, seconds."""
    left = list(reversed(asked))
    began = time.perf_counter()

    def ask() -> None:
        manager.add_request(left.pop(), max_new_tokens=max_tokens)

    for _ in range(min(clients, len(left))):
        ask()
    tokens = 0
    for _ in asked:
        output = manager.get_result(timeout=300)
        if output is None or output.error is not None:
            raise RuntimeError(f"the bare manager failed: {output and output.error}")
        tokens += len(output.generated_tokens)
        if left:
            ask()
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


class BareProcess:
    """A bare manager over PEFT's model, in its own process."""

    def __init__(self, what: Bare) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving_bare"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._exchange(asdict(what))

    def __enter__(self) -> BareProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def saturate(
        self, asked: Sequence[list[int]], *, clients: int, max_tokens: int
    ) -> dict[str, float]:
        return self._exchange({"asked": list(asked), "clients": clients, "max_tokens": max_tokens})

    def _exchange(self, document: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the bare manager's process has ended")
        answer: dict[str, float] = json.loads(line)
        return answer


def main() -> None:
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    what = Bare(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(what.threads)
    manager = manager_of(plain_peft(what), what)
    manager.warmup()
    manager.start()
    try:
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            print(json.dumps(saturate(manager, **json.loads(line))), flush=True)
    finally:
        manager.stop(block=True, timeout=10, hard_stop=True)


if __name__ == "__main__":
    main()
