"""Quantized base layers: their adapters are ordinary matrices, and the slot takes them as such."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from hotswap_lib import BASE, Envelope, InvalidEnvelope, Slot, null_image, pack, prepare
from hotswap_lib.layers import lora_layers
from hotswap_lib.peft_internals import layer_kind
from tests.hotswap_lib.families import IDS, assert_near, pad, randomize

MAX_RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, dict[str, Any]] = {
    "low": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS)},
    "rslora": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["k_proj", "down_proj"],
        "use_rslora": True,
    },
    "patterns": {
        "r": 3,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {"up_proj": 5},
    },
}
WITH_DORA: dict[str, dict[str, Any]] = {
    "dora": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "low": ADAPTERS["low"],
    "wide-dora": {"r": 8, "target_modules": list(TARGETS), "use_dora": True},
}


def _int8() -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


def _nf4() -> Any:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _qlora() -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@dataclass(frozen=True)
class Quantization:
    """One way to quantize a base model.

    Attributes:
        library: what has to be installed for it.
        config: the quantization config for transformers.
        kind: the LoRA class that PEFT chooses, as `hotswap_lib.layer_kinds` names it.
        dtype: of all that is not quantized.
    """

    name: str
    library: str
    config: Callable[[], Any]
    kind: str
    dtype: torch.dtype = torch.float32


QUANTIZATIONS = {
    q.name: q
    for q in (
        Quantization("int8", "bitsandbytes", _int8, "bnb.Linear8bitLt"),
        Quantization("nf4", "bitsandbytes", _nf4, "bnb.Linear4bit"),
        Quantization("qlora", "bitsandbytes", _qlora, "bnb.Linear4bit", torch.bfloat16),
        Quantization("torchao", "torchao", _torchao, "torchao.TorchaoLoraLinear"),
    )
}


class Quantized:
    """A tiny saved model, loaded the way that people load a big one."""

    def __init__(self, quantization: Quantization, folder: Path) -> None:
        self.quantization = quantization
        self._folder = folder

    @property
    def in_bfloat16(self) -> bool:
        return self.quantization.dtype is torch.bfloat16

    def base(self, *, packed: bool = True) -> Any:
        """The base model, loaded and quantized anew: 8 bit layers cannot be copied once used.

        Args:
            packed: whether bitsandbytes may repack 4 bit weights in the first forward pass, as it
                does on CPUs that have AVX512-BF16. PEFT's DoRA reads repacked weights wrongly.
        """
        model = AutoModelForCausalLM.from_pretrained(
            str(self._folder),
            quantization_config=self.quantization.config(),
            device_map="cpu",
            dtype=self.quantization.dtype,
        ).eval()
        if not packed:
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
        return model

    def save(self, folder: Path, *, seed: int, **config: Any) -> Path:
        """Write an adapter that was trained over the quantized model."""
        model = get_peft_model(self.base(), LoraConfig(**config))
        randomize(model, seed)
        model.save_pretrained(str(folder))
        return folder

    def fresh(self, path: Path, *, padded: bool, packed: bool = True) -> torch.Tensor:
        """The logits of a fresh PeftModel with the adapter."""
        model = PeftModel.from_pretrained(self.base(packed=packed), str(path)).eval()
        if padded:
            pad(model, MAX_RANK)
        return logits(model)


def require(library: str) -> None:
    reason = f"{library} is not installed: see tests/extras/conftest.py"
    pytest.importorskip(library, reason=reason)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(IDS).logits
    return output


def commit(slot: Slot, path: Path) -> None:
    slot.commit(slot.stage(pack(path, slot.layout)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(str(path))
    return path


@pytest.fixture(params=QUANTIZATIONS)
def quantized(request: pytest.FixtureRequest, folder: Path) -> Quantized:
    quantization = QUANTIZATIONS[request.param]
    require(quantization.library)
    return Quantized(quantization, folder)


def test_the_lora_layers_are_of_the_quantized_class(quantized: Quantized) -> None:
    targets = [*TARGETS, "lm_head"]
    slot = prepare(quantized.base(), envelope=Envelope(MAX_RANK, targets))
    kinds = {name: layer_kind(layer) for name, layer in lora_layers(slot.model, "default").items()}
    # transformers leaves the head as it is: two kinds of layers in one slot
    head = kinds.pop("lm_head")
    assert head in ("layer.Linear", quantized.quantization.kind)
    assert set(kinds.values()) == {quantized.quantization.kind}
    assert len(kinds) == 2 * len(TARGETS)
    slot.verify()


def test_with_an_envelope_alone_a_quantized_model_is_itself(
    quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized.base()
    before = logits(model)
    slot = prepare(model, envelope=Envelope(MAX_RANK, list(TARGETS)))
    assert torch.equal(logits(slot.model), before)
    commit(slot, quantized.save(tmp_path, seed=1, **ADAPTERS["wide"]))
    assert not torch.equal(logits(slot.model), before)
    slot.commit(slot.stage(null_image(slot.layout)))
    assert slot.revision == BASE
    assert torch.equal(logits(slot.model), before)


def test_swaps_in_any_order_over_a_quantized_model_equal_fresh_models(
    quantized: Quantized, tmp_path: Path
) -> None:
    paths = {
        name: quantized.save(tmp_path / name, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    expected = {name: quantized.fresh(path, padded=True) for name, path in paths.items()}
    slot = prepare(quantized.base(), envelope=Envelope(MAX_RANK, list(TARGETS)))
    unpadded = {name: quantized.fresh(path, padded=False) for name, path in paths.items()}
    # in bfloat16 two orders of adding up may differ by a step of a number near one
    tolerance = 0.02 if quantized.in_bfloat16 else 1e-4
    for name in ("wide", "low", "patterns", "rslora", "wide", "low", "rslora", "patterns"):
        commit(slot, paths[name])
        slot.verify()
        assert torch.equal(logits(slot.model), expected[name])
        assert_near(logits(slot.model), unpadded[name], tolerance=tolerance)
    slot.rollback()
    assert torch.equal(logits(slot.model), expected["rslora"])
    slot.rollback()
    assert torch.equal(logits(slot.model), expected["patterns"])
    slot.verify()


def test_a_quantized_peft_model_goes_on_as_it_was(quantized: Quantized, tmp_path: Path) -> None:
    check_goes_on(quantized, tmp_path, packed=False)


def test_a_quantized_peft_model_that_has_run_goes_on_as_it_was(
    quantized: Quantized, tmp_path: Path
) -> None:
    check_goes_on(quantized, tmp_path, packed=True)


def check_goes_on(quantized: Quantized, folder: Path, *, packed: bool) -> None:
    paths = {
        name: quantized.save(folder / name, seed=seed, **ADAPTERS[name])
        for seed, name in enumerate(("patterns", "wide"))
    }
    expected = {n: quantized.fresh(p, padded=True, packed=packed) for n, p in paths.items()}
    model = PeftModel.from_pretrained(quantized.base(packed=packed), str(paths["patterns"]))
    logits(model.eval())  # bitsandbytes rearranges its weights in the first pass
    slot = prepare(model, envelope=Envelope(MAX_RANK, list(TARGETS)))
    assert slot.model is model
    assert torch.equal(logits(model), expected["patterns"])
    for name in ("wide", "patterns"):
        commit(slot, paths[name])
        assert torch.equal(logits(model), expected[name])
    slot.verify()


def test_dora_over_a_quantized_model_equals_fresh_models(
    quantized: Quantized, tmp_path: Path
) -> None:
    if quantized.quantization.name == "int8":
        pytest.skip("PEFT's DoRA over 8 bit layers fails on a CPU in its second forward pass")
    paths = {
        name: quantized.save(tmp_path / name, seed=seed, **config)
        for seed, (name, config) in enumerate(WITH_DORA.items())
    }
    fresh = {name: quantized.fresh(paths[name], padded=True, packed=False) for name in paths}
    model = quantized.base(packed=False)
    before = logits(model)
    slot = prepare(model, envelope=Envelope(MAX_RANK, list(TARGETS), use_dora=True))
    assert torch.equal(logits(slot.model), before)
    for name in ("dora", "low", "wide-dora", "low", "dora"):
        commit(slot, paths[name])
        slot.verify()
        if name == "low" and quantized.in_bfloat16:
            # PEFT rounds what LoRA adds to bfloat16 before it adds it, and DoRA after
            assert_near(logits(slot.model), fresh[name], tolerance=0.02)
        else:
            assert torch.equal(logits(slot.model), fresh[name])
    before_last = logits(slot.model)
    slot.rollback()
    slot.rollback()
    assert torch.equal(logits(slot.model), before_last)
    slot.commit(slot.stage(null_image(slot.layout)))
    assert torch.equal(logits(slot.model), before)


def test_dora_over_8_bit_layers_on_a_cpu_is_refused_and_the_model_goes_on(folder: Path) -> None:
    require("bitsandbytes")
    model = Quantized(QUANTIZATIONS["int8"], folder).base()
    before = logits(model)
    with pytest.raises(InvalidEnvelope) as caught:
        prepare(model, envelope=Envelope(MAX_RANK, list(TARGETS), use_dora=True))
    assert caught.value.field == "use_dora"
    assert torch.equal(logits(model), before)
