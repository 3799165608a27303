"""Whole layers are compiled around opaque attention, and answers stay exact.

Transformers' own parts of this are tested in test_transformers_internals.py.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

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
NOT_GROUPED = {"num_key_value_heads": 4}  # the paged cache reads it from any config

# architecture → its config on top of SIZES
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


# one with grouped queries, one with two kinds of masks, one with learned positions; the others
# differ from these in their blocks, not in their attention
IN_SHORT = {"Qwen3", "Gemma3", "OPT"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.slow)
        for name in sorted(WHOLE)
    ],
)
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
    # graphs are captured but not lowered: rounding in inductor is not tested here
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


def test_a_model_without_numbered_layers_or_a_choice_of_attention_is_unchanged() -> None:
    class Plain(nn.Module):
        _supports_attention_backend = True

    assert not make_opaque(Plain())
    model, ids = llama(), torch.tensor([[3, 1, 4]])
    expected = model(input_ids=ids).logits
    model._supports_attention_backend = False
    assert not make_opaque(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_an_opaque_model_computes_what_it_did_and_is_collected_when_it_is_gone() -> None:
    model, ids = llama(), torch.tensor([[3, 1, 4]])
    expected = model(input_ids=ids).logits
    assert make_opaque(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "the registry of layers keeps a model alive"


def test_the_operation_tells_dynamo_the_shape_that_it_returns() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = torch.empty(1, 4, 7, 8), torch.empty(1, 2, 7, 8)
        out = paged_attention(query, key, key, torch.tensor(0), None, None, None, None)
    assert out.shape == (1, 7, 4, 8)
