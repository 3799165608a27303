"""Tiny models of many families, adapters of every kind for them, and what PEFT makes of both."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = torch.arange(12)[None] % 32


class ConvNet(torch.nn.Module):
    """Every layer that transformers' language models do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 8)
        self.line = torch.nn.Conv1d(8, 8, 3, padding=1)
        self.plane = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = torch.nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.space = torch.nn.Conv3d(8, 4, (1, 3, 3), padding=(0, 1, 1))
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4 * 8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.line(self.embed(ids).transpose(1, 2)))  # (batch, 8, 12)
        x = torch.relu(self.grouped(torch.relu(self.plane(x[:, None]))))  # (batch, 8, 8, 12)
        x = torch.relu(self.norm(self.space(x[:, :, None]).squeeze(2)))  # (batch, 4, 8, 12)
        output: torch.Tensor = self.head(x.mean(-1).flatten(1))
        return output


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        build: makes it.
        targets: modules that LoRA can go on; the envelope takes all of them.
        saved: modules that can be saved whole.
        embeddings: those of the targets that are embeddings.
        rank_step: ranks are multiples of it.
        dora: targets under DoRA, where that is fewer.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    embeddings: tuple[str, ...] = ()
    rank_step: int = 1
    dora: tuple[str, ...] | None = None

    def base(self) -> torch.nn.Module:
        """The base model, a new copy each time."""
        return copy.deepcopy(_base(self.name))

    def outputs(self, model: torch.nn.Module) -> torch.Tensor:
        """The outputs of a model of this family for twelve tokens."""
        with torch.no_grad():
            if self.name == "t5":
                output: torch.Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
            elif self.name == "convnet":
                output = model(IDS)
            else:
                output = model(IDS).logits
        return output

    def save(self, folder: Path, *, seed: int, **config: Any) -> Path:
        """Write an adapter with random weights, the way that a trainer would.

        ``config`` is LoraConfig's, and ``dtype``: what the weights are stored in.
        """
        dtype = config.pop("dtype", torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(self.base(), LoraConfig(**config))
            randomize(model, seed)
            model.save_pretrained(str(folder))
        if dtype is not torch.float32:
            path = folder / "adapter_model.safetensors"
            # copied, because a mapped file cannot be written over; base weights that PEFT saves
            # with LoRA on embeddings would be other base weights if they were rounded
            tensors = {
                key: tensor.to(dtype) if _is_trained(key, tensor) else tensor.clone()
                for key, tensor in load_file(path).items()
            }
            save_file(tensors, path)
        return folder

    def fresh(self, path: Path, *, padded_to: int | None = None) -> PeftModel:
        """A fresh PeftModel with the adapter, as PEFT loads it or padded to a rank."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(self.base(), str(path)).eval()
        if padded_to is not None:
            pad(model, padded_to)
        return model


def is_near(output: torch.Tensor, expected: torch.Tensor, *, tolerance: float = 1e-4) -> bool:
    """True if no value differs by more than a part of the largest one.

    Products of other shapes, and other orders of the same sum, round differently on each
    processor. Products of equal shapes are compared with torch.equal.
    """
    difference = float((output.float() - expected.float()).abs().max())
    return difference <= tolerance * float(expected.float().abs().max())


def assert_near(output: torch.Tensor, expected: torch.Tensor, *, tolerance: float = 1e-4) -> None:
    """See `is_near`."""
    difference = (output.float() - expected.float()).abs().max()
    assert is_near(output, expected, tolerance=tolerance), f"they differ by up to {difference}"


def _is_trained(key: str, tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not key.endswith("base_layer.weight")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give everything that is trained random values; magnitudes near what they were."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        elif "lora_" in name or (parameter.requires_grad and "modules_to_save" not in name):
            parameter.data.normal_(std=0.2)
        elif "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    for name, buffer in model.named_buffers():
        if "modules_to_save" in name and buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))


def pad(model: torch.nn.Module, rank: int) -> None:
    """Zeros up to a rank, written without a look at how the library does it."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            groups = getattr(layer.get_base_layer(), "groups", 1)
            for held in layer.lora_A.values():
                held.weight.data = _pad_dim(held.weight.data, 0, rank, groups)
            for held in layer.lora_B.values():
                held.weight.data = _pad_dim(held.weight.data, 1, rank // groups, 1)
            for name in layer.lora_embedding_A:
                held = layer.lora_embedding_A[name]
                held.data = _pad_dim(held.data, 0, rank, 1)
                held = layer.lora_embedding_B[name]
                held.data = _pad_dim(held.data, 1, rank, 1)


def _pad_dim(tensor: torch.Tensor, dim: int, size: int, groups: int) -> torch.Tensor:
    parts = []
    for part in tensor.chunk(groups, dim):
        shape = list(part.shape)
        shape[dim] = size // groups - part.shape[dim]
        parts.append(torch.cat([part, torch.zeros(shape, dtype=part.dtype)], dim))
    return torch.cat(parts, dim)


_LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            ("lm_head", "norm"),
        ),
        Family(
            "qwen2",  # biases in its attention, and the embedding tied to the head
            lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
            ("q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"),
            ("model.norm",),
            embeddings=("embed_tokens",),
        ),
        Family(
            "gpt2",
            lambda: GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=32,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    n_positions=16,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            ),
            ("c_attn", "c_proj", "c_fc", "wte"),
            ("ln_f",),
            embeddings=("wte",),
        ),
        Family(
            "bert",
            lambda: BertForSequenceClassification(
                BertConfig(
                    vocab_size=32,
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=24,
                    max_position_embeddings=16,
                    num_labels=3,
                )
            ),
            ("query", "key", "value", "dense", "word_embeddings"),
            ("classifier",),
            embeddings=("word_embeddings",),
        ),
        Family(
            "t5",
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
            ),
            ("q", "k", "v", "o", "wi", "wo"),
            ("final_layer_norm",),
        ),
        Family(
            "convnet",
            ConvNet,
            ("embed", "line", "plane", "grouped", "space"),
            ("head", "norm"),
            embeddings=("embed",),
            rank_step=4,
            dora=("embed", "line", "plane", "space"),
        ),
    )
}


@functools.cache
def _base(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name].build().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.shape == (4,):  # BatchNorm's statistics
            buffer.add_(0.1)
    return model
