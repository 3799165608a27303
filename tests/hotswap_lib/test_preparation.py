from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hotswap_lib import (
    BASE,
    AdapterRefused,
    AlreadyCompiled,
    Envelope,
    HotswapError,
    InvalidEnvelope,
    NothingToRollBack,
    NotPrepared,
    load_adapter,
    pack,
    prepare,
)

from .families import assert_near

Adapters = dict[str, Path]
Expected = dict[str, torch.Tensor]


def test_with_an_envelope_alone_the_model_is_the_base_model(tiny: Any, expected: Expected) -> None:
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    assert slot.revision == BASE
    assert torch.equal(tiny.logits(slot.model), expected["base"])
    assert not slot.model.training
    assert not any(p.requires_grad for n, p in slot.model.named_parameters() if "lora_" in n)
    assert not any(p.is_meta for p in slot.model.parameters())
    slot.verify()


@pytest.mark.parametrize("name", ["wide", "attention", "patterns", "rslora"])
def test_with_a_first_adapter_the_same_model_goes_on_as_it_was(
    tiny: Any, adapters: Adapters, expected: Expected, name: str
) -> None:
    model = tiny.peft_model(adapters[name])
    slot = prepare(model, envelope=tiny.envelope)
    assert slot.model is model
    assert slot.revision.digest == load_adapter(adapters[name]).revision.digest
    assert torch.equal(tiny.logits(model), expected[name])
    with pytest.raises(NothingToRollBack):
        slot.rollback()
    for other in ("attention", "wide", name):
        slot.commit(slot.stage(pack(adapters[other], slot.layout)))
        assert torch.equal(tiny.logits(model), expected[other])


def test_both_ways_lead_to_the_same_layout(tiny: Any, adapters: Adapters) -> None:
    from_adapter = prepare(tiny.peft_model(adapters["attention"]), envelope=tiny.envelope)
    from_envelope = prepare(tiny.base(), envelope=tiny.envelope)
    assert from_adapter.layout.fingerprint == from_envelope.layout.fingerprint


def test_without_an_envelope_it_is_the_smallest_for_the_first_adapter(
    tiny: Any, adapters: Adapters, expected: Expected
) -> None:
    slot = prepare(tiny.peft_model(adapters["patterns"]))
    assert slot.envelope.max_rank == 16
    assert {entry.module.split(".")[-1] for entry in slot.layout.entries} == {
        "q_proj",
        "down_proj",
    }
    assert_near(tiny.logits(slot.model), expected["patterns"])
    with pytest.raises(InvalidEnvelope):
        prepare(tiny.base())


def test_preparing_again_returns_the_slot_and_another_envelope_is_refused(tiny: Any) -> None:
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    assert prepare(slot.model) is slot
    assert prepare(slot.model, envelope=Envelope(max_rank=tiny.max_rank)) is slot
    with pytest.raises(InvalidEnvelope, match="another envelope"):
        prepare(slot.model, envelope=Envelope(max_rank=4))


def _whole(model: torch.nn.Module) -> Any:
    return torch.compile(model)


def _in_place(model: torch.nn.Module) -> torch.nn.Module:
    model.compile()
    return model


def _one_layer(model: torch.nn.Module) -> torch.nn.Module:
    next(layer for name, layer in model.named_modules() if name.endswith("layers.1")).compile()
    return model


@pytest.mark.parametrize("compiled", [_whole, _in_place, _one_layer])
def test_a_model_that_is_compiled_in_any_way_is_refused(
    tiny: Any, adapters: Adapters, compiled: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    with pytest.raises(AlreadyCompiled):
        prepare(compiled(tiny.base()), envelope=tiny.envelope)
    with pytest.raises(AlreadyCompiled):
        prepare(compiled(tiny.peft_model(adapters["wide"])), envelope=tiny.envelope)


def structure(model: torch.nn.Module) -> list[tuple[str, str]]:
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    return modules + [(name, str(tuple(p.shape))) for name, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("envelope", "code"),
    [
        (Envelope(max_rank=4), "rank_over_envelope"),
        (Envelope(max_rank=16, target_modules=["q_proj"]), "target_outside_envelope"),
        (Envelope(max_rank=16, target_modules=["q_proj", "norm"]), "invalid_envelope"),
        (Envelope(max_rank=16, target_modules=["no_such_module"]), "invalid_envelope"),
        (Envelope(max_rank=16, modules_to_save=["no_such_module"]), "invalid_envelope"),
    ],
)
def test_a_refusal_leaves_a_peft_model_as_it_was(
    tiny: Any, adapters: Adapters, envelope: Envelope, code: str
) -> None:
    model = tiny.peft_model(adapters["wide"])
    before, config, output = structure(model), repr(model.peft_config), tiny.logits(model)
    with pytest.raises(HotswapError) as caught:
        prepare(model, envelope=envelope)
    assert caught.value.code == code
    assert structure(model) == before
    assert repr(model.peft_config) == config
    assert torch.equal(tiny.logits(model), output)
    prepare(model, envelope=tiny.envelope).verify()


@pytest.mark.parametrize("targets", [["no_such_module"], ["q_proj", "norm"], ["norm"]])
def test_a_refusal_leaves_a_plain_model_as_it_was(tiny: Any, targets: list[str]) -> None:
    model = tiny.base()
    before = structure(model)
    with pytest.raises(InvalidEnvelope) as caught:
        prepare(model, envelope=Envelope(max_rank=4, target_modules=targets))
    assert caught.value.field == "target_modules"
    assert structure(model) == before
    assert not hasattr(model, "peft_config")
    prepare(model, envelope=tiny.envelope).verify()


def test_a_first_adapter_with_dora_is_refused_and_goes_on_working(tiny: Any) -> None:
    config = LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(tiny.base(), config).eval()
    before, output = structure(model), tiny.logits(model)
    with pytest.raises(AdapterRefused) as caught:
        prepare(model, envelope=tiny.envelope)
    assert caught.value.code == "feature_outside_envelope"
    assert structure(model) == before
    assert torch.equal(tiny.logits(model), output)


def test_a_merged_and_an_unknown_adapter_are_refused(tiny: Any, adapters: Adapters) -> None:
    model = tiny.peft_model(adapters["wide"])
    with pytest.raises(NotPrepared, match="default"):
        prepare(model, adapter_name="other")
    model.merge_adapter()
    with pytest.raises(NotPrepared, match="merged"):
        prepare(model)


def test_other_adapters_of_the_model_stay_untouched(tiny: Any, adapters: Adapters) -> None:
    model = tiny.peft_model(adapters["wide"])
    model.load_adapter(str(adapters["attention"]), "default_v2")
    model.set_adapter("default_v2")
    output = tiny.logits(model)
    slot = prepare(model, envelope=tiny.envelope)
    assert torch.equal(tiny.logits(model), output)
    slot.commit(slot.stage(pack(adapters["rslora"], slot.layout)))
    assert torch.equal(tiny.logits(model), output)


def test_two_slots_with_names_that_contain_each_other_are_independent(
    tiny: Any, adapters: Adapters, expected: Expected
) -> None:
    model = tiny.peft_model(adapters["wide"])
    model.load_adapter(str(adapters["attention"]), "default_v2")
    one = prepare(model, envelope=tiny.envelope)
    two = prepare(model, envelope=tiny.envelope, adapter_name="default_v2")
    one.commit(one.stage(pack(adapters["patterns"], one.layout)))
    two.commit(two.stage(pack(adapters["rslora"], two.layout)))
    for slot, name in ((one, "patterns"), (two, "rslora")):
        model.set_adapter(slot.adapter_name)
        slot.verify()
        assert torch.equal(tiny.logits(model), expected[name])


def test_a_copy_of_the_base_model_shares_nothing_with_the_slot(
    tiny: Any, adapters: Adapters, expected: Expected
) -> None:
    slot = prepare(tiny.peft_model(adapters["wide"]), envelope=tiny.envelope)
    twin = copy.deepcopy(slot.model)
    assert isinstance(twin, PeftModel)
    slot.commit(slot.stage(pack(adapters["attention"], slot.layout)))
    assert torch.equal(tiny.logits(twin), expected["wide"])
