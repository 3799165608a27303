from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hotswap_lib import (
    BASE,
    Envelope,
    ForeignStaged,
    LayoutMismatch,
    NothingToRollBack,
    Slot,
    SlotTensorMoved,
    Staged,
    VerifyFailed,
    pack,
    prepare,
)

from .families import assert_near, is_near

Adapters = dict[str, Path]
Expected = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def stage(slot: Slot, adapters: Adapters) -> Callable[[str], Staged]:
    return lambda name: slot.stage(pack(adapters[name], slot.layout))


def pointers(slot: Slot) -> list[int]:
    layers = [module for module in slot.model.modules() if hasattr(module, "lora_A")]
    return [
        tensor.data_ptr()
        for layer in layers
        if layer.scaling
        for tensor in (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.scaling["default"],
        )
    ]


def test_every_swap_is_bit_equal_to_the_padded_peft_model_in_any_order(
    slot: Slot, tiny: Any, expected: Expected, stage: Callable[[str], Staged]
) -> None:
    names = ["wide", "attention", "patterns", "wide", "rslora", "one-module", "attention"]
    for name in names:
        slot.commit(stage(name))
        slot.verify()
        assert torch.equal(tiny.logits(slot.model), expected[name]), name


@pytest.mark.parametrize("name", ["wide", "attention", "rslora", "patterns", "one-module"])
def test_a_swap_is_close_to_an_unpadded_peft_model(
    slot: Slot, tiny: Any, adapters: Adapters, stage: Callable[[str], Staged], name: str
) -> None:
    slot.commit(stage(name))
    reference = tiny.logits(tiny.peft_model(adapters[name]))
    assert_near(tiny.logits(slot.model), reference)
    assert not is_near(reference, tiny.logits(tiny.base()), tolerance=1e-2)


def test_a_receipt_tells_what_was_done(slot: Slot, stage: Callable[[str], Staged]) -> None:
    staged = stage("wide")
    assert slot.revision == BASE
    receipt = slot.commit(staged)
    assert (receipt.revision, receipt.previous) == (staged.revision, BASE)
    assert (receipt.image_bytes, receipt.copies) == (slot.layout.nbytes, 1)
    assert receipt.commit_us > 0
    assert slot.revision == slot.live.revision == staged.revision


def test_rollback_goes_back_and_forth_and_ends_at_the_base_model(
    slot: Slot, tiny: Any, expected: Expected, stage: Callable[[str], Staged]
) -> None:
    with pytest.raises(NothingToRollBack):
        slot.rollback()
    slot.commit(stage("wide"))
    assert slot.rollback().revision == BASE
    assert torch.equal(tiny.logits(slot.model), expected["base"])
    slot.commit(stage("wide"))
    slot.commit(stage("attention"))
    for name in ("wide", "attention", "wide"):
        assert slot.rollback().revision.name == name
        slot.verify()
        assert torch.equal(tiny.logits(slot.model), expected[name])
        assert slot.model.peft_config["default"].r == {"wide": 8, "attention": 4}[name]


def test_committing_what_is_live_keeps_the_way_back(
    slot: Slot, stage: Callable[[str], Staged]
) -> None:
    slot.commit(stage("wide"))
    slot.commit(stage("attention"))
    slot.commit(stage("attention"))
    assert slot.rollback().revision.name == "wide"


def test_a_staged_image_can_wait_while_others_are_committed(
    slot: Slot, tiny: Any, expected: Expected, stage: Callable[[str], Staged]
) -> None:
    early = stage("rslora")
    slot.commit(stage("wide"))
    assert torch.equal(tiny.logits(slot.model), expected["wide"])
    slot.commit(early)
    assert torch.equal(tiny.logits(slot.model), expected["rslora"])


def test_an_image_for_another_layout_and_a_foreign_staged_one_are_refused(
    slot: Slot, tiny: Any, adapters: Adapters, stage: Callable[[str], Staged]
) -> None:
    other = prepare(tiny.base(), envelope=Envelope(max_rank=32))
    with pytest.raises(LayoutMismatch):
        slot.stage(pack(adapters["wide"], other.layout))
    with pytest.raises(ForeignStaged):
        other.commit(stage("wide"))
    assert slot.revision == other.revision == BASE


def test_one_image_serves_every_replica_of_the_same_layout(
    slot: Slot, tiny: Any, adapters: Adapters, expected: Expected
) -> None:
    replica = prepare(tiny.base(), envelope=tiny.envelope)
    image = pack(adapters["patterns"], slot.layout)
    for one in (slot, replica):
        one.commit(one.stage(image))
        assert torch.equal(tiny.logits(one.model), expected["patterns"])


def test_no_swap_moves_a_tensor(slot: Slot, stage: Callable[[str], Staged]) -> None:
    before = pointers(slot)
    assert all(pointer % 64 == 0 for pointer in before)
    for name in ("wide", "rslora", "attention"):
        slot.commit(stage(name))
    slot.rollback()
    assert pointers(slot) == before
    slot.check_pinned()


def test_peft_config_tells_the_truth_about_the_live_adapter(
    slot: Slot, tiny: Any, adapters: Adapters, stage: Callable[[str], Staged]
) -> None:
    config = slot.model.peft_config["default"]
    assert (config.r, config.target_modules) == (16, "all-linear")
    for name in ("patterns", "rslora", "one-module"):
        slot.commit(stage(name))
        fresh = tiny.peft_model(adapters[name]).peft_config["default"]
        assert slot.model.peft_config["default"] is config
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
            assert getattr(config, field) == getattr(fresh, field), field
        assert config.target_modules == fresh.target_modules
    slot.rollback()
    assert config.use_rslora is True


@pytest.mark.parametrize("suffix", ["lora_A.default.weight", "lora_B.default.weight"])
def test_verify_names_the_weight_with_one_flipped_bit(
    slot: Slot, stage: Callable[[str], Staged], suffix: str
) -> None:
    slot.commit(stage("wide"))
    weight = dict(slot.model.named_parameters())[f"base_model.model.{Q}.{suffix}"]
    weight.data.view(torch.int32)[1, 2] ^= 1
    with pytest.raises(VerifyFailed) as caught:
        slot.verify()
    assert caught.value.tensor == f"base_model.model.{Q}.{suffix.replace('default.', '')}"
    slot.commit(stage("wide"))
    slot.verify()


def test_verify_names_the_scaling_with_one_flipped_bit(
    slot: Slot, stage: Callable[[str], Staged]
) -> None:
    slot.commit(stage("wide"))
    layer = slot.model.get_base_model().get_submodule(Q)
    layer.scaling["default"].view(torch.int32).bitwise_xor_(1)
    with pytest.raises(VerifyFailed) as caught:
        slot.verify()
    assert caught.value.tensor == f"base_model.model.{Q}.scaling"


def _replace_scaling(layer: Any) -> None:
    dict.__setitem__(layer.scaling, "default", float(layer.scaling["default"]))


def _replace_parameter(layer: Any) -> None:
    weight = layer.lora_A["default"].weight
    layer.lora_A["default"].weight = torch.nn.Parameter(weight.data, requires_grad=False)


def _move_data(layer: Any) -> None:
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.clone()


def _change_dtype(layer: Any) -> None:
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.half()


@pytest.mark.parametrize("move", [_replace_scaling, _replace_parameter, _move_data, _change_dtype])
def test_a_slot_tensor_that_was_rebound_is_noticed(
    slot: Slot, stage: Callable[[str], Staged], move: Callable[[Any], None]
) -> None:
    slot.commit(stage("wide"))
    move(slot.model.get_base_model().get_submodule(Q))
    for check in (slot.check_pinned, slot.verify):
        with pytest.raises(SlotTensorMoved, match=r"layers\.0\.self_attn\.q_proj"):
            check()


def _assign(layer: Any) -> None:
    layer.scaling["default"] = 3.5


def _set_scale(layer: Any) -> None:
    layer.set_scale("default", 0.25)


def _scale(layer: Any) -> None:
    layer.scale_layer(0.25)


def _unscale(layer: Any) -> None:
    layer.unscale_layer(0.25)


@pytest.mark.parametrize("assign", [_assign, _set_scale, _scale, _unscale])
def test_peft_writes_scalings_into_the_slot_and_a_commit_brings_them_back(
    slot: Slot,
    tiny: Any,
    expected: Expected,
    stage: Callable[[str], Staged],
    assign: Callable[[Any], None],
) -> None:
    slot.commit(stage("patterns"))
    assign(slot.model.get_base_model().get_submodule(Q))
    slot.check_pinned()
    with pytest.raises(VerifyFailed, match=r"layers\.0\.self_attn\.q_proj\.scaling"):
        slot.verify()
    assert not torch.equal(tiny.logits(slot.model), expected["patterns"])
    slot.commit(stage("patterns"))
    slot.verify()
    assert torch.equal(tiny.logits(slot.model), expected["patterns"])


def test_a_scale_for_one_call_leaves_nothing_behind(
    slot: Slot, stage: Callable[[str], Staged]
) -> None:
    slot.commit(stage("patterns"))
    layer = slot.model.get_base_model().get_submodule(Q)
    layer.scale_layer(0.5)
    layer.unscale_layer(0.5)
    slot.verify()


def test_a_copy_of_the_model_has_scalings_of_its_own(
    slot: Slot, tiny: Any, stage: Callable[[str], Staged]
) -> None:
    slot.commit(stage("patterns"))
    before = tiny.logits(slot.model)
    copied = copy.deepcopy(slot.model)
    copied.get_base_model().get_submodule(Q).scaling["default"] = 0.0
    slot.verify()
    assert torch.equal(tiny.logits(slot.model), before)
    assert not torch.equal(tiny.logits(copied), before)


def test_a_commit_inside_inference_mode_works_and_one_outside_after_it(
    slot: Slot, tiny: Any, expected: Expected, stage: Callable[[str], Staged]
) -> None:
    with torch.inference_mode():
        slot.commit(stage("wide"))
        inside = slot.model(torch.arange(12)[None]).logits
    assert torch.equal(inside, expected["wide"])
    slot.commit(stage("attention"))
    assert torch.equal(tiny.logits(slot.model), expected["attention"])


def test_commits_from_many_threads_leave_one_whole_image(
    slot: Slot, stage: Callable[[str], Staged]
) -> None:
    images = [stage(name) for name in ("wide", "attention", "rslora")]

    def swap(staged: Staged) -> None:
        for _ in range(20):
            slot.commit(staged)
            slot.rollback()

    threads = [threading.Thread(target=swap, args=(staged,)) for staged in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    slot.verify()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_slot_equals_a_peft_model_cast_to_it(
    tiny: Any, adapters: Adapters, dtype: str
) -> None:
    base = tiny.base().to(getattr(torch, dtype))
    slot = prepare(base, envelope=Envelope(max_rank=16, dtype=dtype))
    for name in ("wide", "patterns", "attention"):
        slot.commit(slot.stage(pack(adapters[name], slot.layout)))
        reference = tiny.peft_model(adapters[name], padded=True).to(getattr(torch, dtype))
        for module in reference.modules():
            if hasattr(module, "lora_A") and module.scaling:
                module.scaling["default"] = module.scaling["default"].float()
        assert_near(tiny.logits(slot.model), tiny.logits(reference), tolerance=2e-2)
        slot.verify()


def test_over_a_half_precision_model_the_slot_keeps_float32_as_peft_does(
    tiny: Any, adapters: Adapters
) -> None:
    from peft import PeftModel

    slot = prepare(tiny.base().bfloat16(), envelope=tiny.envelope)
    slot.commit(slot.stage(pack(adapters["wide"], slot.layout)))
    reference = PeftModel.from_pretrained(tiny.base().bfloat16(), str(adapters["wide"])).eval()
    assert {entry.dtype for entry in slot.layout.entries} == {"float32"}
    assert_near(tiny.logits(slot.model), tiny.logits(reference), tolerance=2e-2)
