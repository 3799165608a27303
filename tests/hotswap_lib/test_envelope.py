from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from hotswap_lib import Envelope, InvalidEnvelope


def test_equal_envelopes_are_equal_whatever_the_targets_came_in() -> None:
    envelope = Envelope(max_rank=8, target_modules={"v_proj", "q_proj"}, dtype=torch.bfloat16)
    assert envelope == Envelope(8, ["q_proj", "v_proj"], dtype="bfloat16")
    assert envelope == pickle.loads(pickle.dumps(envelope))
    assert hash(envelope) == hash(Envelope(8, ("q_proj", "v_proj"), dtype="bfloat16"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_rank", 0),
        ("max_rank", True),
        ("max_rank", 8.0),
        ("max_rank", "8"),
        ("target_modules", []),
        ("target_modules", ""),
        ("use_dora", "yes"),
        ("bias", "some"),
        ("dtype", "int8"),
        ("modules_to_save", "classifier"),
        ("dtype", torch.int32),
    ],
)
def test_a_senseless_field_is_refused_by_name(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"max_rank": 8, field: value}
    with pytest.raises(InvalidEnvelope) as caught:
        Envelope(**fields)
    assert caught.value.field == field


def test_all_biases_and_saved_modules_exclude_each_other() -> None:
    with pytest.raises(InvalidEnvelope, match="twice") as caught:
        Envelope(max_rank=8, bias="all", modules_to_save=["score"])
    assert caught.value.field == "bias"


def test_dora_and_a_bias_on_lora_b_exclude_each_other() -> None:
    with pytest.raises(InvalidEnvelope, match="both") as caught:
        Envelope(max_rank=8, use_dora=True, lora_bias=True)
    assert caught.value.field == "lora_bias"
