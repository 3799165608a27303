from __future__ import annotations

import pytest
import torch

from hotswap_lib.digest import revision_of

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
CONFIG = {"r": 2, "lora_alpha": 4, "peft_type": "LORA"}


def digest(config: dict[str, object] = CONFIG, **tensors: torch.Tensor) -> str:
    return revision_of("x", config, {**TENSORS, **tensors}).digest


def test_the_same_content_in_another_order_is_the_same_revision() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert revision_of("x", CONFIG, backwards) == revision_of("x", CONFIG, TENSORS)


@pytest.mark.parametrize(
    "changed",
    [
        {"r": 4},
        {"lora_alpha": 5},
        {"rank_pattern": {"q": 1}},
        {"alpha_pattern": {"q": 1}},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["head"]},
    ],
)
def test_a_field_that_changes_the_output_changes_the_revision(changed: dict[str, object]) -> None:
    assert digest({**CONFIG, **changed}) != digest()


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_dropout": 0.5},
        {"base_model_name_or_path": "/elsewhere"},
        {"inference_mode": True},
        {"use_rslora": False, "rank_pattern": None, "bias": "none", "modules_to_save": []},
    ],
)
def test_a_field_that_does_not_change_the_output_is_left_out(changed: dict[str, object]) -> None:
    assert digest({**CONFIG, **changed}) == digest()


def test_one_bit_a_shape_a_dtype_and_a_key_each_change_the_revision() -> None:
    flipped = TENSORS["a"].clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    variants = [
        digest(a=flipped),
        digest(a=TENSORS["a"].view(3, 2)),
        digest(a=TENSORS["a"].view(torch.int32)),
        digest(c=torch.ones(1)),
    ]
    assert len({*variants, digest()}) == 5


def test_bfloat16_and_non_contiguous_tensors_have_digests() -> None:
    square = torch.randn(4, 4, dtype=torch.bfloat16)
    assert digest(a=square.t()) == digest(a=square.t().contiguous()) != digest(a=square)


def test_the_order_of_patterns_is_content_because_peft_takes_the_first_that_matches() -> None:
    one = {"alpha_pattern": {"q": 1, "layers.0.q": 2}}
    other = {"alpha_pattern": {"layers.0.q": 2, "q": 1}}
    assert digest({**CONFIG, **one}) != digest({**CONFIG, **other})
