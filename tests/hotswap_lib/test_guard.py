"""Swaps in compiled models: nothing is compiled again, and the outputs stay right."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from hotswap_lib import (
    AdapterImage,
    CompileGuard,
    Envelope,
    RecompiledAfterWarmup,
    Slot,
    hotswap_adapter,
    null_image,
    pack,
    prepare,
)

from .families import FAMILIES, assert_near, is_near, randomize

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


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_swaps_in_any_order_never_recompile_a_compiled_model(
    tiny: Any, adapters: Adapters, expected: dict[str, torch.Tensor], backend: str
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
        assert_near(tiny.logits(slot.model), expected[slot.revision.name])
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
        assert_near(tiny.logits(compiled), reference)
    guard.check()


def compile_whole(slot: Slot, **how: Any) -> Any:
    return torch.compile(slot.model, **how)


def compile_layers(slot: Slot, **how: Any) -> Any:
    for layer in slot.model.get_base_model().model.layers:
        layer.compile(**how)
    return slot.model


def swap_often(
    slot: Slot,
    eager: Slot,
    images: Mapping[str, AdapterImage],
    run: Callable[[torch.nn.Module], torch.Tensor],
    compiled: torch.nn.Module,
    *,
    turns: int = 50,
) -> None:
    """Random swaps and rollbacks of a warm compiled slot, each compared with an eager slot."""
    where = {key: tensor.data_ptr() for key, tensor in slot.tensors.items()}
    staged = {name: (slot.stage(image), eager.stage(image)) for name, image in images.items()}
    for _ in range(3):
        run(compiled)
    guard, order = CompileGuard(), random.Random(0)
    outputs = {}
    for turn in range(turns):
        if turn % 7 == 6:
            slot.rollback()
            eager.rollback()
        else:  # each of them once, then any
            names = sorted(staged)
            mine, other = staged[names[turn] if turn < len(names) else order.choice(names)]
            slot.commit(mine)
            eager.commit(other)
        slot.check_pinned()
        output = run(compiled)
        outputs[slot.revision] = output.clone()
        # compiled code fuses operations that the eager model rounds one by one
        assert_near(output, run(eager.model))
    assert (guard.recompiles, guard.limit_hits) == (0, 0)
    guard.check()
    slot.verify()
    assert where == {key: tensor.data_ptr() for key, tensor in slot.tensors.items()}
    # every image was live, and none was mistaken for another
    assert len(outputs) == len(images)
    values = list(outputs.values())
    assert not any(is_near(a, b) for a in values for b in values if a is not b)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAVED = ["lm_head", "model.norm"]
CONFIGS: dict[str, dict[str, Any]] = {
    "wide": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "attention": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 2, "target_modules": ["k_proj", "up_proj"], "use_rslora": True},
    "patterns": {"r": 1, "target_modules": ALL, "rank_pattern": {"o_proj": 8, "q_proj": 3}},
}
DORA_CONFIGS: dict[str, dict[str, Any]] = {
    "both": {"r": 8, "target_modules": ALL[:3], "use_dora": True, "modules_to_save": SAVED},
    "dora": {"r": 3, "target_modules": ["q_proj"], "use_dora": True},
    "saved": {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "neither": {"r": 4, "target_modules": ALL[:3], "use_rslora": True},
}


def one_layer() -> Any:
    """The smallest Llama: what is compiled for real has to be compiled in seconds."""
    model: Any = FAMILIES["llama"].base()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model


def pack_all(
    configs: Mapping[str, dict[str, Any]], slot: Slot, folder: Path
) -> dict[str, AdapterImage]:
    images = {"base": null_image(slot.layout)}
    for seed, (name, config) in enumerate(configs.items()):
        model = get_peft_model(one_layer(), LoraConfig(**config))
        randomize(model, seed)
        model.save_pretrained(str(folder / name))
        images[name] = pack(folder / name, slot.layout)
    return images


slow = pytest.mark.slow


# Guards are dynamo's and the same for every backend; code is generated for the modes in use.
@pytest.mark.parametrize(
    ("compile_it", "dynamic", "backend", "turns"),
    [
        (compile_layers, False, "inductor", 13),
        (compile_whole, True, "eager", 13),
        pytest.param(compile_layers, False, "inductor", 50, marks=slow),
        pytest.param(compile_layers, True, "eager", 50, marks=slow),
        pytest.param(compile_whole, False, "inductor", 50, marks=slow),
        pytest.param(compile_whole, True, "eager", 50, marks=slow),
    ],
)
def test_random_swaps_recompile_nothing_in_any_compile_mode(
    tmp_path: Path, compile_it: Callable[..., Any], dynamic: bool, backend: str, turns: int
) -> None:
    slot, eager = (prepare(one_layer(), envelope=Envelope(8, ALL)) for _ in range(2))
    images = pack_all(CONFIGS, slot, tmp_path)
    compiled = compile_it(slot, dynamic=dynamic, backend=backend)
    swap_often(slot, eager, images, FAMILIES["llama"].outputs, compiled, turns=turns)


@pytest.mark.parametrize(
    ("compile_it", "backend", "turns"),
    [
        (compile_layers, "eager", 13),
        pytest.param(compile_whole, "eager", 50, marks=slow),
        pytest.param(compile_layers, "inductor", 50, marks=slow),
    ],
)
def test_swaps_between_adapters_with_and_without_dora_and_saved_modules_recompile_nothing(
    tmp_path: Path, compile_it: Callable[..., Any], backend: str, turns: int
) -> None:
    envelope = Envelope(8, ALL[:3], SAVED, use_dora=True)
    slot, eager = (prepare(one_layer(), envelope=envelope) for _ in range(2))
    images = pack_all(DORA_CONFIGS, slot, tmp_path)
    compiled = compile_it(slot, dynamic=False, backend=backend)
    swap_often(slot, eager, images, FAMILIES["llama"].outputs, compiled, turns=turns)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("compile_it", [compile_whole, compile_layers])
def test_random_swaps_record_no_new_cuda_graph_either(
    tmp_path: Path, compile_it: Callable[..., Any]
) -> None:
    slot, eager = (prepare(one_layer().cuda(), envelope=Envelope(8, ALL)) for _ in range(2))
    images = pack_all(CONFIGS, slot, tmp_path)
    compiled = compile_it(slot, dynamic=False, mode="reduce-overhead")
    ids = torch.arange(12, device="cuda")[None]

    def run(model: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            # copied, because the next run writes its outputs over these
            output: torch.Tensor = model(ids).logits.clone()
        return output

    swap_often(slot, eager, images, run, compiled)


def test_scalings_that_are_numbers_hit_the_recompile_limit_and_the_guard_says_so(
    tiny: Any, adapters: Adapters
) -> None:
    model = tiny.peft_model(adapters["attention"])  # as PEFT leaves it, not prepared
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager", dynamic=False)
    tiny.logits(model)
    guard = CompileGuard()
    with torch._dynamo.config.patch(recompile_limit=4):  # the two layers share one function
        for scaling in (0.25, 0.5, 0.75, 1.5):
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.scaling["default"] = scaling
            tiny.logits(model)
    assert guard.recompiles > 0
    assert guard.limit_hits > 0
    with pytest.raises(RecompiledAfterWarmup, match="recompile limits") as caught:
        guard.check()
    assert caught.value.recompiles == guard.recompiles
    assert caught.value.limit_hits == guard.limit_hits
