"""A model that no longer reads its slot is noticed before a commit could say that it worked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale

from hotswap_lib import (
    AdapterMerged,
    HotswapError,
    NotPrepared,
    Slot,
    SlotTensorMoved,
    Staged,
    hotswap_adapter,
    pack,
    prepare,
)

from .families import assert_near

Adapters = dict[str, Path]
Expected = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def two(slot: Slot, adapters: Adapters) -> tuple[Staged, Staged]:
    """Two staged adapters, the first of them live."""
    staged = [slot.stage(pack(adapters[name], slot.layout)) for name in ("wide", "patterns")]
    slot.commit(staged[0])
    return staged[0], staged[1]


def test_nothing_is_committed_into_a_merged_model(
    slot: Slot,
    two: tuple[Staged, Staged],
    tiny: Any,
    adapters: Adapters,
    expected: Expected,
) -> None:
    slot.rollback()
    slot.commit(two[0])
    slot.model.merge_adapter()
    for swap in (
        lambda: slot.commit(two[1]),
        slot.rollback,
        lambda: slot.stage(two[1].image),
        lambda: hotswap_adapter(slot.model, adapters["patterns"]),
    ):
        with pytest.raises(AdapterMerged, match="default"):
            swap()
    slot.model.unmerge_adapter()
    slot.commit(two[1])
    assert_near(tiny.logits(slot.model), expected["patterns"])


def _half(slot: Slot) -> None:
    slot.model.half()


def _there_and_back(slot: Slot) -> None:
    slot.model.to(torch.bfloat16).to(torch.float32)


def _to_meta(slot: Slot) -> None:
    slot.model.to("meta")


def _unload(slot: Slot) -> None:
    slot.model.unload()


def _delete(slot: Slot) -> None:
    slot.model.add_adapter("other", copy.deepcopy(slot.model.peft_config["default"]))
    slot.model.delete_adapter("default")


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("leave", [_half, _there_and_back, _to_meta, _unload, _delete])
def test_a_model_that_has_left_its_slot_gets_no_receipt(
    slot: Slot, two: tuple[Staged, Staged], leave: Callable[[Slot], None]
) -> None:
    leave(slot)
    with pytest.raises(SlotTensorMoved):
        slot.check_pinned()
    with pytest.raises(SlotTensorMoved):
        slot.stage(two[1].image)
    with pytest.raises(SlotTensorMoved):
        slot.commit(two[1])
    assert slot.revision == two[0].revision


def test_a_part_of_the_model_that_was_replaced_is_noticed_when_the_next_image_is_staged(
    slot: Slot, two: tuple[Staged, Staged]
) -> None:
    layers = slot.model.get_base_model().model.layers
    layers[0] = copy.deepcopy(layers[0])
    for check in (slot.check_pinned, slot.verify, lambda: slot.stage(two[1].image)):
        with pytest.raises(SlotTensorMoved, match=r"layers\.0\."):
            check()


@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_an_adapter_that_peft_loaded_over_the_slot_is_not_the_slots(
    slot: Slot, two: tuple[Staged, Staged], adapters: Adapters
) -> None:
    slot.model.load_adapter(str(adapters["attention"]), "other")
    slot.model.delete_adapter("default")
    slot.model.load_adapter(str(adapters["wide"]), "default")
    with pytest.raises(SlotTensorMoved):
        hotswap_adapter(slot.model, adapters["patterns"])
    with pytest.raises(SlotTensorMoved):
        slot.commit(two[1])


def test_layers_that_were_compiled_into_wrappers_are_still_the_slots(
    slot: Slot, two: tuple[Staged, Staged], tiny: Any, expected: Expected
) -> None:
    layers = slot.model.get_base_model().model.layers
    for index in range(len(layers)):
        layers[index] = torch.compile(layers[index], backend="eager")
    slot.commit(slot.stage(two[1].image))
    slot.verify()
    assert_near(tiny.logits(slot.model), expected["patterns"])


def test_preparing_the_base_model_again_returns_its_slot(tiny: Any, adapters: Adapters) -> None:
    base = tiny.base()
    slot = prepare(base, envelope=tiny.envelope)
    hotswap_adapter(base, adapters["wide"])
    assert prepare(base, envelope=tiny.envelope) is slot
    assert slot.revision.name == "wide"


def test_lora_that_transformers_put_into_the_model_is_not_thrown_away(
    tiny: Any, adapters: Adapters, expected: Expected
) -> None:
    base = tiny.base()
    base.load_adapter(str(adapters["wide"]))
    config = base.peft_config
    with pytest.raises(NotPrepared, match="lift the adapter out"):
        prepare(base, envelope=tiny.envelope)
    assert base.peft_config is config
    assert_near(tiny.logits(base), expected["wide"])


def test_a_refusal_leaves_what_is_trained_as_it_was(tiny: Any) -> None:
    from hotswap_lib import Envelope

    base = tiny.base()
    base.lm_head.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(HotswapError):
        prepare(base, envelope=Envelope(max_rank=4, target_modules=["q_proj", "no_such"]))
    assert [parameter.requires_grad for parameter in base.parameters()] == before


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_a_name_that_no_adapter_can_have_is_refused(tiny: Any, name: str) -> None:
    with pytest.raises(NotPrepared, match="cannot have this name"):
        prepare(tiny.base(), envelope=tiny.envelope, adapter_name=name)


def test_inductors_freezing_is_refused(tiny: Any) -> None:
    config: Any = torch._inductor.config
    with config.patch(freezing=True), pytest.raises(NotPrepared, match="freezing"):
        prepare(tiny.base(), envelope=tiny.envelope)


def _halve(layer: Any) -> None:
    layer.set_scale("default", 0.5)


def _reset(layer: Any) -> None:
    layer.unscale_layer()


@pytest.mark.parametrize("name", ["wide", "patterns", "rslora"])
def test_pefts_scale_functions_do_what_they_do_on_a_fresh_model(
    slot: Slot, tiny: Any, adapters: Adapters, name: str
) -> None:
    fresh = PeftModel.from_pretrained(tiny.base(), str(adapters[name])).eval()
    slot.commit(slot.stage(pack(adapters[name], slot.layout)))
    ours: dict[str, Any] = dict(slot.model.get_base_model().named_modules())
    theirs = [
        (path, layer)
        for path, layer in fresh.get_base_model().named_modules()
        if hasattr(layer, "set_scale")
    ]
    for scale in (_halve, _reset):
        for path, layer in theirs:
            scale(layer)
            scale(ours[path])
            assert float(ours[path].scaling["default"]) == pytest.approx(
                layer.scaling["default"], rel=1e-5
            )
    assert_near(tiny.logits(slot.model), tiny.logits(fresh))


def test_a_rescaled_model_goes_back_to_the_slots_scalings(
    slot: Slot, two: tuple[Staged, Staged], tiny: Any, expected: Expected
) -> None:
    with rescale_adapter_scale(slot.model, multiplier=0.5):
        assert not torch.equal(tiny.logits(slot.model), expected["wide"])
    slot.verify()
    slot.commit(two[1])
    slot.verify()
    assert_near(tiny.logits(slot.model), expected["patterns"])
