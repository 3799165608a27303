"""Whole layers are compiled around attention, where that can be, and answers are exact.

What attention.py uses of transformers has a test here that fails with a sentence when it changes.
"""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hotswap_lib import Envelope, pack, prepare
from serve_app.engine.attention import make_opaque, paged_attention
from tests.e2e.tiny_world import TinyWorld
from tests.hotswap_lib.families import randomize
from tests.serve_app.generating import Running

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 16}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
NOT_GROUPED = {"num_key_value_heads": 4}  # the paged cache asks for it, whoever knows it or not

# architecture → what its config has beside SIZES
WHOLE: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": SLIDING,
    "Gemma2": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Gemma3": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Phi3": NOT_GROUPED,
    "GPTNeoX": NOT_GROUPED,
    "GPT2": NOT_GROUPED,
    "OPT": {**NOT_GROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32},
}
PROMPTS = [[5], [3, 1, 4, 1, 5], [(7 * i) % 90 + 2 for i in range(45)]]
TOKENS = 8


def base(name: str) -> Any:
    """A tiny random model of the architecture."""
    known = {"Gemma3": "Gemma3Text"}
    config_class = getattr(transformers, f"{known.get(name, name)}Config")
    model_class = getattr(
        transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    )
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **WHOLE[name]})
    # as serve_app.loading does: Gemma2 cannot have any other
    config._attn_implementation = "eager" if name == "Gemma2" else "sdpa"
    return model_class(config).eval()


def plain(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=TOKENS,
        )
    return list(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_every_layer_of_it_is_compiled_once_and_answers_are_those_of_a_plain_model(
    world: TinyWorld, tmp_path: Path, name: str
) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "GPT2")
    model = get_peft_model(base(name), lora)
    randomize(model, 1)
    model.save_pretrained(str(tmp_path))
    slot = prepare(base(name), envelope=Envelope(max_rank=4))
    images = {"one": pack(tmp_path, slot.layout)}
    expected = PeftModel.from_pretrained(base(name), str(tmp_path)).eval()
    # what dynamo makes of it is asked here, not how inductor rounds
    with torch.compiler.set_stance(force_backend="eager"):
        running = Running(world, images, slot=slot, compile=True, lanes=1)
        try:

            async def story() -> None:
                await running.engine.warm_up()
                running.engine.admission.open()
                assert running.engine.compiled_regions == SIZES["num_hidden_layers"]
                for ids in PROMPTS:
                    step = await running.answer(ids, TOKENS)
                    assert step.token_ids == plain(base(name), ids)
                await running.swap("one")
                steps = await asyncio.gather(*(running.answer(ids, TOKENS) for ids in PROMPTS))
                assert [step.token_ids for step in steps] == [plain(expected, i) for i in PROMPTS]
                running.engine.guard.check()

            running(story())
        finally:
            running.close()


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def test_a_model_without_numbered_layers_or_a_choice_of_attention_stays_as_it_is() -> None:
    class Plain(nn.Module):
        _supports_attention_backend = True

    assert not make_opaque(Plain())
    model = llama()
    model._supports_attention_backend = False
    assert not make_opaque(model)
    assert not model._forward_pre_hooks


def test_only_the_layers_get_another_attention_not_the_model() -> None:
    model = llama()
    before = model.config._attn_implementation
    assert make_opaque(model)
    assert model.config._attn_implementation == before
    names = {m.config._attn_implementation for m in model.modules() if hasattr(m, "layer_idx")}
    assert names == {"hotswap_paged"}


# ---- canaries: what attention.py relies on and nobody promised ----------------------------------


def test_transformers_still_takes_attention_functions_by_name() -> None:
    assert "hotswap_paged" in ALL_ATTENTION_FUNCTIONS, "AttentionInterface.register is another"
    for name in ("sdpa_paged", "paged|sdpa", "sdpa"):
        if name in ALL_ATTENTION_FUNCTIONS:
            break
    else:
        pytest.fail("there is no sdpa attention to hand the work to")


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3"])
def test_transformers_still_says_that_attention_can_be_chosen(name: str) -> None:
    found = getattr(transformers, f"{name}ForCausalLM")
    assert found._supports_attention_backend, f"{name}: _supports_attention_backend is gone"


def test_transformers_still_numbers_the_layers_and_gives_them_their_config() -> None:
    layers = [m for m in llama().modules() if hasattr(m, "layer_idx")]
    assert [layer.layer_idx for layer in layers] == [0, 1], "layer_idx means something else now"
    assert all(hasattr(layer, "config") for layer in layers), "a layer has no config any more"


def test_transformers_still_calls_attention_with_what_the_operation_takes() -> None:
    source = inspect.getsource(type(llama().model.layers[0].self_attn).forward)
    assert "attention_interface(" in source, "a layer asks for its attention in another way"
    assert "scaling=" in source, "attention gets its scaling in another way"
    taken = set(inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters)
    wanted = {"module", "query", "key", "value", "attention_mask", "scaling"}
    assert wanted <= taken, f"sdpa takes other arguments: {taken}"


def test_the_operation_tells_dynamo_the_shape_that_it_returns() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = torch.empty(1, 4, 7, 8), torch.empty(1, 2, 7, 8)
        out = paged_attention(query, key, key, torch.tensor(0), None, None, None, None)
    assert out.shape == (1, 7, 4, 8)
