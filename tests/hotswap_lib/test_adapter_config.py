"""A configuration is parsed once, when an adapter is made, by the rules that PEFT has."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from hotswap_lib import Adapter, AdapterConfigInvalid
from hotswap_lib.adapter_config import AdapterConfig


def parse(**config: Any) -> AdapterConfig:
    return AdapterConfig.parse("bot", {"peft_type": "LORA", **config})


def test_missing_fields_have_pefts_defaults() -> None:
    config = parse()
    assert (config.rank("q_proj"), config.scaling("q_proj")) == (8, 1.0)
    assert (config.use_dora, config.lora_bias, config.bias) == (False, False, "none")
    assert config.has_lora_on("q_proj")
    assert not config.saves("lm_head")


def test_ranks_and_scalings_follow_the_first_pattern_that_matches() -> None:
    config = parse(
        r=4,
        lora_alpha=16,
        rank_pattern={r"layers\.0\.q": 2, "q": 8},
        alpha_pattern={"v": 6},
    )
    assert [config.rank(name) for name in ("layers.0.q", "layers.1.q", "v")] == [2, 8, 4]
    assert [config.scaling(name) for name in ("layers.0.q", "layers.1.q", "v")] == [8, 2, 1.5]
    assert parse(r=4, lora_alpha=16, use_rslora=True).scaling("q") == 8


def test_targets_and_saved_modules_are_matched_as_in_peft() -> None:
    config = parse(
        target_modules=["q", "v"], exclude_modules=["layers.1.v"], modules_to_save=["head"]
    )
    names = ("layers.0.q", "layers.0.v", "layers.1.v", "layers.0.k")
    assert [config.has_lora_on(name) for name in names] == [True, True, False, False]
    assert config.saves("model.head")


@pytest.mark.parametrize("config", [{"target_modules": "all-linear"}, {"target_modules": None}])
def test_targets_that_only_a_model_can_resolve_match_every_module(config: dict[str, Any]) -> None:
    assert parse(**config).has_lora_on("anything")


def test_an_adapter_with_an_invalid_configuration_cannot_be_made() -> None:
    with pytest.raises(AdapterConfigInvalid, match="rank 'r'") as caught:
        Adapter(name="bot", config={"peft_type": "LORA", "r": 0}, tensors={})
    assert caught.value.adapter == "bot"


def test_a_parsed_adapter_pickles() -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q"]}
    adapter = Adapter(name="bot", config=config, tensors={"a": torch.ones(2)})
    copy = pickle.loads(pickle.dumps(adapter))
    assert copy.parsed_config.rank("q") == 4
    assert copy.parsed_config.has_lora_on("q")
