"""On a GPU: CUDA graphs keep reading the slot, and nothing is compiled again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hotswap_lib import CompileGuard, Envelope, pack, prepare

from .families import assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_fifty_swaps_compile_nothing_and_stay_exact_under_cuda_graphs(
    tiny: Any, adapters: dict[str, Path], mode: str | None
) -> None:
    slot = prepare(tiny.base().cuda(), envelope=Envelope(max_rank=tiny.max_rank))
    images = {name: pack(path, slot.layout) for name, path in adapters.items()}
    model: Any = torch.compile(slot.model, mode=mode)
    ids = torch.arange(12, device="cuda")[None]
    plain = {name: tiny.peft_model(path).cuda() for name, path in adapters.items()}
    with torch.no_grad():
        want = {name: one(ids).logits for name, one in plain.items()}
        for _ in range(3):
            model(ids)
        guard = CompileGuard()
        for turn in range(50):
            name = list(images)[turn * 7 % len(images)]
            slot.commit(slot.stage(images[name]))
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            assert_near(model(ids).logits, want[name])
    slot.verify()
    guard.check()


def test_a_commit_is_one_copy_on_the_device(tiny: Any, adapters: dict[str, Path]) -> None:
    slot = prepare(tiny.base().cuda(), envelope=Envelope(max_rank=tiny.max_rank))
    staged = slot.stage(pack(adapters["wide"], slot.layout))
    assert {block.device.type for block in staged.blocks} == {"cuda"}
    assert slot.commit(staged).copies == 1
    slot.verify()
