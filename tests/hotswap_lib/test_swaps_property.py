"""Any adapters inside the envelope, in any order, with rollbacks: always what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hotswap_lib import BASE, hotswap_adapter, prepare

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = st.integers(1, 16)
PATTERN = st.sampled_from([*MODULES, r"layers\.0\..*proj", "model.layers.1.mlp.up_proj"])

configs = st.fixed_dictionaries(
    {
        "r": RANKS,
        "lora_alpha": st.integers(1, 64),
        "target_modules": st.lists(st.sampled_from(MODULES), min_size=1, unique=True),
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(PATTERN, RANKS, max_size=2),
        "alpha_pattern": st.dictionaries(PATTERN, st.integers(1, 64), max_size=2),
    }
)
steps = st.lists(st.one_of(st.integers(0, 2), st.just("rollback")), min_size=2, max_size=6)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes and tells little here
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=st.lists(configs, min_size=3, max_size=3), steps=steps)
def test_any_sequence_of_swaps_is_bit_equal_to_padded_peft_models(
    tiny: Any, tmp_path: Path, drawn: list[dict[str, Any]], steps: list[Any]
) -> None:
    paths = [
        tiny.save(tmp_path / f"adapter-{index}", seed=index, **config)
        for index, config in enumerate(drawn)
    ]
    expected = {p.name: tiny.logits(tiny.peft_model(p, padded=True)) for p in paths}
    expected[BASE.name] = tiny.logits(tiny.base())
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    for step in [0, *steps]:
        if step == "rollback":
            slot.rollback()
        else:
            hotswap_adapter(slot.model, paths[step])
        slot.verify()
        assert torch.equal(tiny.logits(slot.model), expected[slot.revision.name])
