from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft.utils.hotswap
import pytest
import torch
from peft import LoraConfig

from hotswap_lib import (
    Adapter,
    AlreadyCompiled,
    NotPrepared,
    RankOverEnvelope,
    Receipt,
    hotswap_adapter,
    prepare,
    prepare_model_for_compiled_hotswap,
)
from hotswap_lib.slot import find_slot

from .families import FAMILIES, assert_near

Adapters = dict[str, Path]
Expected = dict[str, torch.Tensor]


def test_the_parameters_are_those_of_peft_with_a_default_name() -> None:
    for name in ("hotswap_adapter", "prepare_model_for_compiled_hotswap"):
        ours = inspect.signature(globals()[name]).parameters
        theirs = inspect.signature(getattr(peft.utils.hotswap, name)).parameters
        assert [(p.name, p.kind) for p in ours.values()] == [
            (p.name, p.kind) for p in theirs.values()
        ]


def test_changing_the_import_is_enough_for_code_written_for_peft(
    tiny: Any, adapters: Adapters, expected: Expected
) -> None:
    model = tiny.peft_model(adapters["wide"])
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    receipt = hotswap_adapter(model, str(adapters["wide"]), "default", torch_device="cpu")
    assert isinstance(receipt, Receipt)
    assert_near(tiny.logits(model), expected["wide"])


def test_a_model_that_was_not_prepared_is_prepared_for_its_first_adapter(
    tiny: Any, adapters: Adapters, expected: Expected
) -> None:
    model = tiny.peft_model(adapters["wide"])
    hotswap_adapter(model, adapters["attention"], adapter_name="default")
    assert_near(tiny.logits(model), expected["attention"])
    with pytest.raises(RankOverEnvelope):
        hotswap_adapter(model, adapters["rslora"])


def test_the_slot_is_found_through_a_compiled_wrapper(tiny: Any, adapters: Adapters) -> None:
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    compiled: Any = torch.compile(slot.model)
    assert find_slot(compiled, "default") is slot
    assert hotswap_adapter(compiled, adapters["wide"]).revision == slot.revision


def test_what_cannot_be_prepared_any_more_is_refused(tiny: Any, adapters: Adapters) -> None:
    unprepared: list[Any] = [tiny.base(), torch.compile(tiny.peft_model(adapters["wide"]))]
    for model in unprepared:
        with pytest.raises(NotPrepared):
            hotswap_adapter(model, adapters["wide"])
    model = tiny.peft_model(adapters["wide"])
    model.compile()
    with pytest.raises(NotPrepared, match="compiled already"):
        hotswap_adapter(model, adapters["wide"])


def test_an_adapter_in_memory_and_a_name_are_taken(tiny: Any, adapters: Adapters) -> None:
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    trained = Adapter.from_peft_model(tiny.peft_model(adapters["patterns"]))
    receipt = hotswap_adapter(slot.model, trained, name="step-1", low_cpu_mem_usage=True)
    assert receipt.revision.name == "step-1"


def test_check_compiled_refuses_warns_or_says_nothing(tiny: Any, adapters: Adapters) -> None:
    def compiled() -> Any:
        return torch.compile(tiny.peft_model(adapters["wide"]))

    with pytest.raises(AlreadyCompiled):
        prepare_model_for_compiled_hotswap(compiled())
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled(), check_compiled="warn")
    model = compiled()
    prepare_model_for_compiled_hotswap(model, check_compiled="ignore")
    assert find_slot(model, "default") is not None
    with pytest.raises(ValueError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(model, check_compiled="maybe")  # type: ignore[arg-type]


def test_configs_get_the_target_rank_and_the_live_one_stays_true(
    tiny: Any, adapters: Adapters
) -> None:
    model = tiny.peft_model(adapters["patterns"])
    other = LoraConfig(r=4, rank_pattern={"q_proj": 8}, target_modules=["q_proj"])
    configs = {**model.peft_config, "other": other}
    prepare_model_for_compiled_hotswap(model, target_rank=16, config=configs)
    assert (other.r, other.rank_pattern) == (16, {"q_proj": 16})
    assert model.peft_config["default"].r == 4
    prepare_model_for_compiled_hotswap(tiny.peft_model(adapters["wide"]), target_rank=16)


def test_a_model_without_adapters_is_refused_by_the_drop_in(tiny: Any) -> None:
    with pytest.raises(NotPrepared):
        prepare_model_for_compiled_hotswap(tiny.base(), target_rank=16)


@pytest.mark.parametrize(
    "features", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["classifier"]}]
)
def test_a_target_rank_changes_the_rank_and_keeps_the_features(
    tmp_path: Path, features: dict[str, Any]
) -> None:
    family = FAMILIES["bert"]
    paths = [
        family.save(tmp_path / str(r), seed=r, r=r, target_modules=["query"], **features)
        for r in (2, 8)
    ]
    model = family.fresh(paths[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, paths[1])
    expected = family.outputs(family.fresh(paths[1], padded_to=8))
    assert torch.equal(family.outputs(model), expected)


def test_a_classifiers_adapter_is_swapped_as_pefts_own_class_writes_it(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    paths = [
        family.save(tmp_path / str(r), seed=r, r=r, target_modules=["query"], task_type="SEQ_CLS")
        for r in (2, 4)
    ]
    model = family.fresh(paths[1])
    hotswap_adapter(model, paths[0])
    assert torch.equal(family.outputs(model), family.outputs(family.fresh(paths[0], padded_to=4)))
