"""Compiles for real; these tests also pin the private counters that the guard reads."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hotswap_lib import CompileGuard, RecompiledAfterWarmup, hotswap_adapter, pack, prepare

Adapters = dict[str, Path]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_the_first_compilation_and_every_recompilation_count() -> None:
    guard = CompileGuard()
    compiled = torch.compile(double, backend="eager", dynamic=False)
    compiled(torch.ones(3))
    assert guard.recompiles == 1
    guard.arm()
    compiled(torch.ones(3))
    guard.check()
    compiled(torch.ones(4))
    assert (guard.recompiles, guard.limit_hits) == (1, 0)
    with pytest.raises(RecompiledAfterWarmup) as caught:
        guard.check()
    assert (caught.value.recompiles, caught.value.limit_hits) == (1, 0)


def test_a_recompile_limit_is_noticed_although_no_graph_is_compiled() -> None:
    compiled = torch.compile(double, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (1, 2):
            compiled(torch.ones(size))
        guard = CompileGuard()
        compiled(torch.ones(3))
    assert (guard.recompiles, guard.limit_hits) == (0, 1)
    with pytest.raises(RecompiledAfterWarmup, match="1 recompile limits"):
        guard.check()


def test_compilations_in_other_threads_count() -> None:
    guard = CompileGuard()
    compiled = torch.compile(double, backend="eager")
    thread = threading.Thread(target=compiled, args=(torch.ones(3),))
    thread.start()
    thread.join()
    assert guard.recompiles == 1


def test_a_guard_goes_on_counting_after_the_counters_were_cleared() -> None:
    compiled = torch.compile(double, backend="eager", dynamic=False)
    compiled(torch.ones(3))
    guard = CompileGuard()
    torch._dynamo.utils.counters.clear()
    assert (guard.recompiles, guard.limit_hits) == (0, 0)
    guard.arm()
    compiled(torch.ones(5))
    assert guard.recompiles == 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps_in_any_order_never_recompile_a_compiled_model(
    tiny: Any, adapters: Adapters, backend: str
) -> None:
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    for layer in slot.model.get_base_model().model.layers:
        layer.compile(backend=backend)
    hotswap_adapter(slot.model, adapters["wide"])
    tiny.logits(slot.model)
    images = {name: pack(path, slot.layout) for name, path in adapters.items()}
    guard, order = CompileGuard(), random.Random(0)
    for turn in range(12):
        name = order.choice(list(images))
        slot.commit(slot.stage(images[name]))
        if turn % 4 == 3:
            slot.rollback()
        name = slot.revision.name
        reference = tiny.logits(tiny.peft_model(adapters[name])) if name != "base" else None
        if reference is not None:
            torch.testing.assert_close(tiny.logits(slot.model), reference, rtol=1e-4, atol=1e-4)
    guard.check()
    slot.verify()


def test_a_whole_compiled_peft_model_is_swapped_without_a_recompilation(
    tiny: Any, adapters: Adapters
) -> None:
    slot = prepare(tiny.peft_model(adapters["attention"]), envelope=tiny.envelope)
    compiled: Any = torch.compile(slot.model, backend="eager")
    tiny.logits(compiled)
    guard = CompileGuard()
    for name in ("wide", "patterns", "rslora", "attention"):
        hotswap_adapter(compiled, adapters[name])
        reference = tiny.logits(tiny.peft_model(adapters[name]))
        torch.testing.assert_close(tiny.logits(compiled), reference, rtol=1e-5, atol=1e-5)
    guard.check()
