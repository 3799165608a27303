"""Tiny random models and adapters with lora_B ≠ 0, and what PEFT itself makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as peft_prepare
from transformers import LlamaConfig, LlamaForCausalLM

from hotswap_lib import Envelope, Slot, prepare

MAX_RANK = 16
IDS = torch.arange(12)[None]

ADAPTERS: dict[str, dict[str, object]] = {
    "wide": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "attention": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {
        "r": 16,
        "lora_alpha": 8,
        "target_modules": ["k_proj", "o_proj", "up_proj"],
        "use_rslora": True,
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 16, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"q_proj": 5, r"^model\.layers\.0\.mlp\.down_proj": 64},
    },
    "one-module": {"r": 1, "lora_alpha": 1, "target_modules": r".*layers\.1.*gate_proj"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = [
        # PEFT 0.21 reads a property that transformers 5.23 deprecates, on every get_peft_model
        "ignore:`is_gradient_checkpointing`:FutureWarning",
        # torch 2.13 itself, the first time that something is compiled
        "ignore:`torch.jit.script_method`:DeprecationWarning",
    ]
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in known:
                item.add_marker(pytest.mark.filterwarnings(warning))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread: more of them only slow thousands of small operations down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


class Tiny:
    """The tiny model, and what tests need to know about it."""

    max_rank = MAX_RANK
    envelope = Envelope(max_rank=MAX_RANK)

    def __init__(self) -> None:
        self._base = _llama()

    def base(self) -> LlamaForCausalLM:
        """The base model, a new copy each time."""
        return copy.deepcopy(self._base)

    def save(self, folder: Path, *, seed: int = 1, **config: object) -> Path:
        """Write an adapter with random weights, the way that a trainer would."""
        model = get_peft_model(self.base(), LoraConfig(**config))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(str(folder))
        return folder

    def peft_model(self, path: Path, *, padded: bool = False) -> PeftModel:
        """A fresh PeftModel with this adapter; padded to the envelope for bit-equality."""
        model = PeftModel.from_pretrained(self.base(), str(path)).eval()
        if padded:
            peft_prepare(model, target_rank=MAX_RANK)
        return model

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """The model's logits for twelve tokens."""
        with torch.no_grad():
            output: torch.Tensor = model(IDS).logits
        return output


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name → directory, for every configuration of `ADAPTERS`."""
    folder = tmp_path_factory.mktemp("adapters")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        return {
            name: tiny.save(folder / name, seed=seed, **config)
            for seed, (name, config) in enumerate(ADAPTERS.items())
        }


@pytest.fixture(scope="session")
def expected(tiny: Tiny, adapters: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Name → logits of the equally padded PeftModel; ``"base"`` → of the base model."""
    # with as many threads as the tests that compare with it
    with one_thread(), pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        padded = {
            name: tiny.logits(tiny.peft_model(path, padded=True)) for name, path in adapters.items()
        }
    with one_thread():
        return {"base": tiny.logits(tiny.base()), **padded}


@pytest.fixture
def slot(tiny: Tiny) -> Slot:
    """A slot over the tiny base model, with nothing but the null adapter in it."""
    return prepare(tiny.base(), envelope=tiny.envelope)


@pytest.fixture
def edit(adapters: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies an adapter and breaks the copy: ``edit("wide", config={...}, tensors=function)``."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    def make(
        name: str,
        *,
        config: dict[str, object] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> Path:
        folder = tmp_path / f"edited-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(adapters[name], folder)
        if config is not None:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if tensors is not None:
            weights = load_file(folder / "adapter_model.safetensors")
            tensors(weights)
            save_file(weights, folder / "adapter_model.safetensors")
        return folder

    return make
