"""Every refusal, with the live slot watched while it happens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hotswap_lib import AdapterRefused, Envelope, Slot, hotswap_adapter, prepare

QA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
QB = QA.replace("lora_A", "lora_B")
Tensors = dict[str, torch.Tensor]


def setting(key: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: value})


def with_value(value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[QB].view(-1).__setitem__(3, value)


def without(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key)


def added(key: str) -> Callable[[Tensors], None]:
    return setting(key, torch.ones(8, 32))


def rank_of(rank: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key, tensor in tensors.items():
            shape = list(tensor.shape)
            shape[0 if "lora_A" in key else 1] = rank
            tensors[key] = torch.ones(shape)

    return change


# what is done to the adapter → the code, and the tensor that the sentence names
TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str, str | None]] = {
    "in_features": (setting(QA, torch.ones(8, 40)), {}, "shape_mismatch", QA),
    "out_features": (setting(QB, torch.ones(31, 8)), {}, "shape_mismatch", QB),
    "dimensions": (setting(QA, torch.ones(8, 32, 1)), {}, "shape_mismatch", QA),
    "rank over": (rank_of(32), {"r": 32}, "rank_over_envelope", None),
    "rank lies": (rank_of(4), {}, "rank_mismatch", None),
    "one rank lies": (setting(QB, torch.ones(32, 4)), {}, "rank_mismatch", QB),
    "no lora_B": (without(QB), {}, "missing_tensor", QB),
    "no lora_A": (without(QA), {}, "missing_tensor", QA),
    "no tensors": (lambda tensors: tensors.clear(), {}, "missing_tensor", None),
    "NaN": (with_value(math.nan), {}, "non_finite", QB),
    "infinity": (with_value(-math.inf), {}, "non_finite", QB),
    "integers": (setting(QA, torch.ones(8, 32, dtype=torch.int8)), {}, "unsupported_adapter", QA),
    "unknown layer": (
        added(QA.replace("layers.0", "layers.7")),
        {},
        "target_outside_envelope",
        QA.replace("layers.0", "layers.7"),
    ),
    "embedding": (
        added("base_model.model.model.embed_tokens.lora_embedding_A"),
        {},
        "target_outside_envelope",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ),
    "DoRA tensor": (
        added(QA.replace("lora_A.weight", "lora_magnitude_vector")),
        {},
        "feature_outside_envelope",
        QA.replace("lora_A.weight", "lora_magnitude_vector"),
    ),
    "base weight": (
        added("base_model.model.lm_head.weight"),
        {},
        "feature_outside_envelope",
        "base_model.model.lm_head.weight",
    ),
}

CONFIG_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "adapter_config_invalid"),
    ({"peft_type": None}, "adapter_config_invalid"),
    ({"r": 0}, "adapter_config_invalid"),
    ({"r": "8"}, "adapter_config_invalid"),
    ({"lora_alpha": math.nan}, "adapter_config_invalid"),
    ({"lora_alpha": 1e300}, "adapter_config_invalid"),
    ({"lora_alpha": None}, "adapter_config_invalid"),
    ({"rank_pattern": {"(": 4}}, "adapter_config_invalid"),
    ({"rank_pattern": {"q_proj": -1}}, "adapter_config_invalid"),
    ({"alpha_pattern": [4]}, "adapter_config_invalid"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_mismatch"),
    ({"use_dora": True}, "feature_outside_envelope"),
    ({"bias": "some"}, "adapter_config_invalid"),
    ({"lora_bias": True}, "feature_outside_envelope"),
    ({"modules_to_save": ["lm_head"]}, "feature_outside_envelope"),
    ({"modules_to_save": "lm_head"}, "adapter_config_invalid"),
    ({"trainable_token_indices": [1]}, "feature_outside_envelope"),
    ({"target_parameters": ["experts.weight"]}, "feature_outside_envelope"),
    ({"alora_invocation_tokens": [1, 2]}, "unsupported_adapter"),
    ({"target_modules": ["q_proj"]}, "adapter_config_invalid"),
    ({"target_modules": r".*layers\.0.*"}, "adapter_config_invalid"),
    ({"exclude_modules": ["q_proj"]}, "adapter_config_invalid"),
    ({"target_modules": [1]}, "adapter_config_invalid"),
    ({"init_lora_weights": "pissa"}, "unsupported_adapter"),
]


@pytest.fixture(scope="module")
def live(tiny: Any, adapters: dict[str, Path]) -> Slot:
    """A slot that serves "wide"; no test of this file may change it."""
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    hotswap_adapter(slot.model, adapters["wide"])
    return slot


def state(slot: Slot) -> tuple[Any, ...]:
    slot.verify()
    scalings = [
        float(module.scaling["default"])
        for module in slot.model.modules()
        if hasattr(module, "scaling") and isinstance(module.scaling, dict)
    ]
    parameters = [p.detach().clone() for n, p in slot.model.named_parameters() if "lora_" in n]
    return slot.revision, repr(slot.model.peft_config), scalings, parameters


def refusal(live: Slot, folder: Path) -> AdapterRefused:
    """The refusal of a hot-swap, after a look that nothing has changed."""
    before = state(live)
    with pytest.raises(AdapterRefused) as caught:
        hotswap_adapter(live.model, folder)
    after = state(live)
    assert before[:3] == after[:3]
    assert all(map(torch.equal, before[3], after[3]))
    assert caught.value.adapter == folder.name
    assert folder.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_bad_tensor_is_refused_by_name_and_nothing_live_changes(
    live: Slot, edit: Callable[..., Path], fault: str
) -> None:
    tensors, config, code, tensor = TENSOR_FAULTS[fault]
    error = refusal(live, edit("wide", config=config, tensors=tensors))
    assert error.code == code
    if tensor is not None:
        assert error.tensor == tensor
        assert tensor in str(error)


@pytest.mark.parametrize(("config", "code"), CONFIG_FAULTS)
def test_a_bad_configuration_is_refused_and_nothing_live_changes(
    live: Slot, edit: Callable[..., Path], config: dict[str, Any], code: str
) -> None:
    assert refusal(live, edit("wide", config=config)).code == code


def test_an_unknown_target_names_the_module_and_the_envelope(
    tiny: Any, adapters: dict[str, Path]
) -> None:
    envelope = Envelope(max_rank=16, target_modules=["q_proj", "v_proj"])
    slot = prepare(tiny.base(), envelope=envelope)
    hotswap_adapter(slot.model, adapters["attention"])
    error = refusal(slot, adapters["wide"])
    assert error.code == "target_outside_envelope"
    assert "is not one of the envelope's targets (q_proj, v_proj)" in str(error)


def test_a_value_that_only_overflows_the_slots_dtype_is_refused(
    tiny: Any, edit: Callable[..., Path]
) -> None:
    slot = prepare(tiny.base(), envelope=Envelope(max_rank=16, dtype="float16"))
    error = refusal(slot, edit("wide", tensors=with_value(1e6)))
    assert (error.code, error.tensor) == ("non_finite", QB)
    assert "cast to float16" in str(error)


def test_a_missing_directory_is_refused_and_nothing_live_changes(
    live: Slot, tmp_path: Path
) -> None:
    assert refusal(live, tmp_path / "nothing").code == "adapter_not_found"


def test_tensors_that_differ_in_dtype_only_are_accepted(
    live: Slot, edit: Callable[..., Path]
) -> None:
    def halve(tensors: Tensors) -> None:
        tensors.update({key: value.half() for key, value in tensors.items()})

    before = live.revision
    folder = edit("wide", tensors=halve)
    assert hotswap_adapter(live.model, folder).previous == before
    live.rollback()
