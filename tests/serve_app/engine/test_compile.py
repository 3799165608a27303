"""Compiled regions: everything inside the layers that does not depend on the layer's number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hotswap_lib import Envelope, prepare
from serve_app.engine.compile import compile_regions, find_regions


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    model: nn.Module = GPT2LMHeadModel(config).eval()
    return model


BOTH = pytest.mark.parametrize("make", [llama, gpt2])


@BOTH
def test_no_region_knows_the_number_of_its_layer(make: Callable[[], nn.Module]) -> None:
    regions = list(find_regions(make()))
    assert regions
    for region in regions:
        assert not any(hasattr(part, "layer_idx") for part in region.modules())


@BOTH
def test_no_region_is_inside_another_one(make: Callable[[], nn.Module]) -> None:
    regions = list(find_regions(make()))
    parts = [id(part) for region in regions for part in region.modules()]
    assert len(parts) == len(set(parts))


def test_every_projection_of_a_llama_is_in_a_region() -> None:
    model = llama()
    inside = {id(part) for region in find_regions(model) for part in region.modules()}
    linears = {
        name: id(part)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "layers" in name
    }
    assert len(linears) == 14
    assert [name for name, part in linears.items() if part not in inside] == []


def test_every_adapter_matrix_of_a_prepared_model_is_in_a_region() -> None:
    slot = prepare(llama(), envelope=Envelope(max_rank=4))
    model = slot.model.get_base_model()
    inside = {id(p) for region in find_regions(model) for p in region.parameters()}
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(lora) == 28
    assert all(id(parameter) in inside for parameter in lora)


def test_a_model_without_layers_has_no_regions() -> None:
    assert compile_regions(nn.Linear(2, 2)) == 0


@BOTH
def test_the_model_computes_what_it_did(make: Callable[[], nn.Module]) -> None:
    model = make()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        # graphs are captured but not lowered: rounding in inductor is not tested here
        with torch.compiler.set_stance(force_backend="eager"):
            assert compile_regions(model) == len(list(find_regions(model)))
            after = model(ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
