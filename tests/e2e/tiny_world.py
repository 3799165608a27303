"""A tiny chat model on disk, adapters for it, and what plain PEFT answers with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hotswap_lib import load_adapter

_TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}<a>"
_CONFIGS: dict[str, dict[str, object]] = {
    "alpha": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "beta": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    "gamma": {"r": 2, "lora_alpha": 16, "target_modules": ["up_proj"], "use_rslora": True},
}


@dataclass(frozen=True)
class TinyWorld:
    """`model`: a saved Llama with tokenizer and chat template. `adapters`: by name."""

    folder: Path
    answers: dict[tuple[str, tuple[int, ...], int], list[int]] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def adapter(self, name: str) -> Path:
        return self.folder / "adapters" / name

    @cached_property
    def revisions(self) -> dict[str, str]:
        """`name@digest8` -> adapter name, for every adapter here."""
        return {str(load_adapter(str(self.adapter(n))).revision): n for n in _CONFIGS}

    def revision(self, name: str) -> str:
        return next(r for r, n in self.revisions.items() if n == name)

    def expected(self, revision: str, prompt_ids: list[int], new_tokens: int) -> list[int]:
        """What a plain PeftModel (or the base) generates greedily; each computed once."""
        key = (revision, tuple(prompt_ids), new_tokens)
        if key not in self.answers:
            model = self.plain(revision)
            ids = torch.tensor([prompt_ids])
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=new_tokens,
                )
            self.answers[key] = out[0, len(prompt_ids) :].tolist()
        return self.answers[key]

    def plain(self, revision: str) -> Any:
        base = LlamaForCausalLM.from_pretrained(self.model)
        if revision.startswith("base@"):
            return base.eval()
        digest = revision.rpartition("@")[2]  # the name may be one that a test gave it
        name = next(n for known, n in self.revisions.items() if known.endswith(f"@{digest}"))
        return PeftModel.from_pretrained(base, str(self.adapter(name))).eval()


def make_world(folder: Path) -> TinyWorld:
    world = TinyWorld(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=259,
        pad_token_id=259,
    )
    LlamaForCausalLM(config).save_pretrained(world.model)
    tiny_tokenizer().save_pretrained(world.model)
    for seed, (name, lora) in enumerate(_CONFIGS.items(), start=1):
        base = LlamaForCausalLM.from_pretrained(world.model)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.5)
        model.save_pretrained(str(world.adapter(name)))
    return world


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    vocabulary |= {"<u>": 256, "<a>": 257, "<unk>": 258, "<e>": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<e>",
        pad_token="<e>",
        additional_special_tokens=["<u>", "<a>"],
        chat_template=_TEMPLATE,
    )
