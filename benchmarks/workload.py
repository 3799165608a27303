"""The model and the adapters of the swap benchmarks."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

MAX_RANK = 64
RANKS = (8, 16, 32, 64)
# (layers, hidden, intermediate) → 32 * 7 linears, 64 * 32 * (11 * 256 + 3 * 768) floats = 42 MB
LAYERS, HIDDEN, INTERMEDIATE = 32, 256, 768


def build_base(device: str) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval().to(device)


def save_adapters(base: torch.nn.Module, folder: Path) -> list[Path]:
    paths = []
    for rank in RANKS:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = get_peft_model(copy.deepcopy(base).cpu(), config)
        torch.manual_seed(rank)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.05)
        model.save_pretrained(str(folder / f"rank-{rank}"))
        paths.append(folder / f"rank-{rank}")
    return paths
