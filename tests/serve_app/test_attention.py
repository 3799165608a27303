"""Whole layers are compiled around attention, where that can be, and answers are exact.

What attention.py uses of transformers has a test here that fails with a sentence when it changes.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hotswap_lib import Envelope, pack, prepare
from serve_app.attention import make_opaque, paged_attention
from serve_app.sampling import Sampling
from tests.e2e.tiny_world import TinyWorld
from tests.hotswap_lib.families import randomize

from .test_causal import Running

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 16}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NOT_GROUPED = {"num_key_value_heads": 4}

# architecture → what its config has beside SIZES
WHOLE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": SLIDING,
    "Gemma2": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Gemma3": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Phi3": NOT_GROUPED,
    "GPTNeoX": {},
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
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
    config._attn_implementation = "sdpa"
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
    model = get_peft_model(base(name), LoraConfig(r=4, target_modules="all-linear"))
    randomize(model, 1)
    model.save_pretrained(str(tmp_path))
    slot = prepare(base(name), envelope=Envelope(max_rank=4))
    images = {"one": pack(tmp_path, slot.layout)}
    expected = PeftModel.from_pretrained(base(name), str(tmp_path)).eval()
    # what dynamo makes of it is asked here, not how inductor rounds
    with torch.compiler.set_stance(force_backend="eager"):
        running = Running(world, images, slot=slot, compile=True, lanes=1, kv_cache_tokens=512)
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
