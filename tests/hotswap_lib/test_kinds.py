"""Swaps with each kind of layer and each kind of checkpoint."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora import dora as peft_dora
from safetensors.torch import load_file, save_file

from hotswap_lib import (
    BASE,
    Adapter,
    AdapterRefused,
    Envelope,
    FeatureOutsideEnvelope,
    InvalidEnvelope,
    NotPrepared,
    RankMismatch,
    Slot,
    load_adapter,
    null_image,
    pack,
    prepare,
)

from .families import FAMILIES, Family, assert_near, pad, randomize

MAX_RANK = 8
LLAMA, QWEN2, GPT2, CONVNET = (FAMILIES[name] for name in ("llama", "qwen2", "gpt2", "convnet"))
Tensors = dict[str, torch.Tensor]


def commit(slot: Slot, source: Path | Adapter) -> None:
    slot.commit(slot.stage(pack(source, slot.layout)))
    slot.verify()


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Replace an adapter's weights by what a function makes of them."""
    file = path / "adapter_model.safetensors"
    # copied, because a mapped file cannot be written over
    tensors = change({key: tensor.clone() for key, tensor in load_file(file).items()})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return path


def structure(model: torch.nn.Module) -> list[tuple[str, str]]:
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    parameters = [(name, str(tuple(p.shape))) for name, p in model.named_parameters()]
    return modules + sorted(parameters)  # PEFT registers those of an attention anew


def check_fresh(family: Family, slot: Slot, path: Path, *, rank: int = MAX_RANK) -> None:
    """The slot's model computes what a fresh PeftModel does, bit for bit."""
    expected = family.outputs(family.fresh(path, padded_to=rank))
    assert torch.equal(family.outputs(slot.model), expected)


def fresh_over(base: torch.nn.Module, path: Path) -> PeftModel:
    """A fresh PeftModel over a copy of this very model, not yet padded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about tied weights
        return PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()


# --- tied weights ---------------------------------------------------------------------------


def tied(family: Family) -> Envelope:
    return Envelope(MAX_RANK, list(family.targets))


def test_lora_on_both_ends_of_tied_weights_swaps(tmp_path: Path) -> None:
    targets = (["embed_tokens", "lm_head"], ["lm_head", "q_proj"], ["embed_tokens"])
    paths = [
        QWEN2.save(tmp_path / str(seed), seed=seed, r=r, target_modules=names)
        for seed, (r, names) in enumerate(zip((2, 8, 5), targets, strict=True))
    ]
    before = QWEN2.outputs(QWEN2.base())
    slot = prepare(QWEN2.base(), envelope=tied(QWEN2))
    for path in (*paths, *paths[::-1]):
        commit(slot, path)
        check_fresh(QWEN2, slot, path)
    slot.commit(slot.stage(null_image(slot.layout)))
    assert torch.equal(QWEN2.outputs(slot.model), before)
    head, embedding = slot.model.get_base_model().lm_head, slot.model.get_input_embeddings()
    assert head.base_layer.weight is embedding.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_carried_embedding_is_accepted_if_it_is_the_base_models(
    tmp_path: Path, target: str, dtype: torch.dtype
) -> None:
    path = QWEN2.save(tmp_path, seed=1, r=2, target_modules=[target])
    model: Any = QWEN2.base().to(dtype)
    weight = model.get_input_embeddings().weight.detach()

    def carry(tensors: Tensors) -> Tensors:
        carried = [key for key in tensors if key.endswith("base_layer.weight")]
        assert carried  # PEFT's save_embedding_layers="auto" put it there
        # a trainer that keeps the model in float32 saves what it was loaded with, widened
        return tensors | {key: weight.float().clone() for key in carried}

    rewrite(path, carry)
    slot = prepare(copy.deepcopy(model), envelope=tied(QWEN2))
    commit(slot, path)
    fresh = fresh_over(model, path)
    pad(fresh, MAX_RANK)
    assert torch.equal(QWEN2.outputs(slot.model), QWEN2.outputs(fresh))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_carried_embedding_that_was_trained_is_refused_by_name(
    tmp_path: Path, target: str
) -> None:
    path = QWEN2.save(tmp_path, seed=1, r=2, target_modules=[target])

    def train(tensors: Tensors) -> Tensors:
        key = next(key for key in tensors if key.endswith("base_layer.weight"))
        tensors[key][3, 3] += 1e-3
        return tensors

    rewrite(path, train)
    slot = prepare(QWEN2.base(), envelope=tied(QWEN2))
    with pytest.raises(FeatureOutsideEnvelope, match="not the one that this base model has") as e:
        pack(path, slot.layout)
    assert e.value.tensor is not None
    assert e.value.tensor.endswith("base_layer.weight")


def test_a_carried_embedding_with_new_tokens_is_refused_by_name(tmp_path: Path) -> None:
    path = QWEN2.save(tmp_path, seed=1, r=2, target_modules=["embed_tokens"])

    def grow(tensors: Tensors) -> Tensors:
        key = next(key for key in tensors if key.endswith("base_layer.weight"))
        return tensors | {key: torch.cat([tensors[key], torch.zeros(1, 16)])}

    rewrite(path, grow)
    slot = prepare(QWEN2.base(), envelope=tied(QWEN2))
    with pytest.raises(AdapterRefused, match="not the one that this base model has"):
        pack(path, slot.layout)


def test_a_carried_embedding_of_a_layer_that_is_no_target_is_refused(tmp_path: Path) -> None:
    path = QWEN2.save(tmp_path, seed=1, r=2, target_modules=["embed_tokens", "q_proj"])
    slot = prepare(QWEN2.base(), envelope=Envelope(MAX_RANK, ["q_proj"]))
    with pytest.raises(AdapterRefused, match="embed_tokens"):
        pack(path, slot.layout)


def test_an_embedding_that_save_pretrained_was_told_to_add_is_judged_alike(tmp_path: Path) -> None:
    # `save_embedding_layers=True` without LoRA on the embedding: its key is the plain one
    model = get_peft_model(QWEN2.base(), LoraConfig(r=2, target_modules=["q_proj"]))
    randomize(model, 1)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    carried = [
        key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in key
    ]
    slot = prepare(QWEN2.base(), envelope=tied(QWEN2))
    with pytest.raises(FeatureOutsideEnvelope, match="weight of the base model") as caught:
        pack(tmp_path, slot.layout)
    assert caught.value.tensor in carried


# --- adapters from compiled models ----------------------------------------------------------


def _whole(model: Any) -> Any:
    return torch.compile(model)


def _per_layer(model: Any) -> Any:
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)
    return model


@pytest.mark.parametrize("wrap", [_whole, _per_layer])
@pytest.mark.parametrize("dora", [False, True])
def test_keys_of_a_compiled_model_are_taken_as_if_it_were_not(
    tmp_path: Path, wrap: Callable[[Any], Any], dora: bool
) -> None:
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": dora}
    plain = LLAMA.save(tmp_path / "plain", seed=1, **config)
    model = get_peft_model(LLAMA.base(), LoraConfig(**config))
    randomize(model, 1)
    folder = tmp_path / "compiled"
    model.save_pretrained(str(folder))
    state = {
        key.replace(".default", ""): value.clone()
        for key, value in wrap(model).state_dict().items()
        if "lora_" in key
    }
    assert all("_orig_mod." in key for key in state)
    save_file(state, folder / "adapter_model.safetensors")
    assert load_adapter(folder, name="a").revision == load_adapter(plain, name="a").revision
    envelope = Envelope(MAX_RANK, ["q_proj", "down_proj"], use_dora=dora)
    slot = prepare(LLAMA.base(), envelope=envelope)
    commit(slot, folder)
    check_fresh(LLAMA, slot, plain)


def test_an_adapter_is_lifted_out_of_a_compiled_model(tmp_path: Path) -> None:
    path = LLAMA.save(tmp_path, seed=1, r=4, target_modules=["q_proj"])
    slot = prepare(LLAMA.base(), envelope=Envelope(MAX_RANK, ["q_proj"]))
    for wrap in (_whole, _per_layer):
        adapter = Adapter.from_peft_model(wrap(LLAMA.fresh(path)))
        commit(slot, adapter)
        check_fresh(LLAMA, slot, path)


# --- dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slot_dtype", [None, torch.bfloat16])
def test_one_checkpoint_may_mix_dtypes_over_a_base_of_any(
    tmp_path: Path, base_dtype: torch.dtype, slot_dtype: torch.dtype | None
) -> None:
    mixed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    paths = [
        rewrite(
            LLAMA.save(tmp_path / str(seed), seed=seed, r=r, target_modules=list(LLAMA.targets)),
            lambda tensors: {
                key: tensors[key].to(mixed[index % 4]) for index, key in enumerate(tensors)
            },
        )
        for seed, r in enumerate((3, 8))
    ]
    base = LLAMA.base().to(base_dtype)
    slot = prepare(
        copy.deepcopy(base), envelope=Envelope(MAX_RANK, list(LLAMA.targets), dtype=slot_dtype)
    )
    for path in (*paths, paths[0]):
        commit(slot, path)
        fresh = fresh_over(base, path)
        if slot_dtype is not None:
            for name, parameter in fresh.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(slot_dtype)
        pad(fresh, MAX_RANK)
        assert torch.equal(LLAMA.outputs(slot.model), LLAMA.outputs(fresh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_swap_over_16_bit_models_as_well(tmp_path: Path, dtype: torch.dtype) -> None:
    targets, saved = ["q_proj", "down_proj"], ["lm_head", "norm"]
    path = LLAMA.save(
        tmp_path, seed=1, r=3, target_modules=targets, modules_to_save=saved, use_dora=True
    )
    base = LLAMA.base().to(dtype)
    before = LLAMA.outputs(base)
    slot = prepare(copy.deepcopy(base), envelope=Envelope(MAX_RANK, targets, saved, use_dora=True))
    assert torch.equal(LLAMA.outputs(slot.model), before)
    commit(slot, path)
    fresh = fresh_over(base, path)
    pad(fresh, MAX_RANK)
    # PEFT may keep a saved module in the checkpoint's dtype, the slot has the base model's
    for name, parameter in fresh.named_parameters():
        if "modules_to_save" in name:
            parameter.data = parameter.data.to(dtype)
    assert torch.equal(LLAMA.outputs(slot.model), LLAMA.outputs(fresh))
    slot.rollback()
    assert torch.equal(LLAMA.outputs(slot.model), before)


# --- convolutions, GPT-2's Conv1D -----------------------------------------------------------


@pytest.mark.parametrize("target", CONVNET.targets)
def test_every_kind_of_layer_swaps_alone(tmp_path: Path, target: str) -> None:
    paths = [
        CONVNET.save(tmp_path / str(r), seed=r, r=r, lora_alpha=3, target_modules=[target])
        for r in (4, 8, 12)
    ]
    slot = prepare(CONVNET.base(), envelope=Envelope(12, list(CONVNET.targets)))
    before = CONVNET.outputs(slot.model)
    for path in (*paths, *paths[::-1]):
        commit(slot, path)
        assert not torch.equal(CONVNET.outputs(slot.model), before)
        check_fresh(CONVNET, slot, path, rank=12)
    slot.rollback()
    check_fresh(CONVNET, slot, paths[1], rank=12)


@pytest.mark.parametrize("target", CONVNET.dora or ())
def test_every_kind_of_layer_swaps_alone_with_dora(tmp_path: Path, target: str) -> None:
    config = {"target_modules": [target], "use_dora": True}
    paths = [CONVNET.save(tmp_path / str(r), seed=r, r=r, **config) for r in (2, 7)]
    envelope = Envelope(MAX_RANK, list(CONVNET.dora or ()), use_dora=True)
    before = CONVNET.outputs(CONVNET.base())
    slot = prepare(CONVNET.base(), envelope=envelope)
    assert torch.equal(CONVNET.outputs(slot.model), before)
    for path in (*paths, paths[0]):
        commit(slot, path)
        check_fresh(CONVNET, slot, path)


def test_ranks_may_differ_between_convolutions(tmp_path: Path) -> None:
    path = CONVNET.save(
        tmp_path,
        seed=1,
        r=3,
        target_modules=list(CONVNET.targets),
        rank_pattern={"grouped": 4, "plane": 7, "embed": 1},
        alpha_pattern={"space": 64},
        use_rslora=True,
    )
    slot = prepare(CONVNET.base(), envelope=Envelope(MAX_RANK, list(CONVNET.targets)))
    image = pack(path, slot.layout)
    assert image.ranks == {"embed": 1, "line": 3, "plane": 7, "grouped": 4, "space": 3}
    slot.commit(slot.stage(image))
    slot.verify()
    check_fresh(CONVNET, slot, path)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_a_rank_that_groups_cannot_share_is_refused_by_name(tmp_path: Path, rank: int) -> None:
    path = CONVNET.save(tmp_path, seed=1, r=8, target_modules=["grouped"])
    config = path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": rank}))
    # PEFT never writes such a checkpoint: the ranks of another one were cut
    rewrite(
        path,
        lambda tensors: {
            key: tensor[:rank] if "lora_A" in key else tensor[:, : max(rank // 4, 1)]
            for key, tensor in tensors.items()
        },
    )
    slot = prepare(CONVNET.base(), envelope=Envelope(MAX_RANK, list(CONVNET.targets)))
    with pytest.raises(RankMismatch, match=f"rank {rank} is not a multiple of .* 4 groups") as e:
        pack(path, slot.layout)
    assert e.value.tensor is not None
    assert "grouped" in e.value.tensor


@pytest.mark.parametrize("max_rank", [2, 6])
def test_an_envelope_that_groups_cannot_share_is_refused(max_rank: int) -> None:
    model = CONVNET.base()
    before = structure(model)
    with pytest.raises(InvalidEnvelope, match="groups"):
        prepare(model, envelope=Envelope(max_rank, list(CONVNET.targets)))
    assert structure(model) == before


def test_dora_on_a_grouped_convolution_is_refused_by_name() -> None:
    model = CONVNET.base()
    before, output = structure(model), CONVNET.outputs(model)
    with pytest.raises(InvalidEnvelope, match="'grouped' is a grouped convolution") as caught:
        prepare(model, envelope=Envelope(MAX_RANK, list(CONVNET.targets), use_dora=True))
    assert caught.value.field == "use_dora"
    assert structure(model) == before
    assert torch.equal(CONVNET.outputs(model), output)


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2s_transposed_linear_layers_swap(tmp_path: Path, dora: bool) -> None:
    paths = [
        GPT2.save(tmp_path / str(r), seed=r, r=r, target_modules=names, use_dora=dora)
        for r, names in ((2, ["c_attn"]), (8, ["c_proj", "c_fc"]), (5, ["c_attn", "c_fc"]))
    ]
    envelope = Envelope(MAX_RANK, ["c_attn", "c_proj", "c_fc"], use_dora=dora)
    slot = prepare(GPT2.base(), envelope=envelope)
    for path in (*paths, *paths[::-1]):
        commit(slot, path)
        expected = GPT2.outputs(GPT2.fresh(path, padded_to=MAX_RANK))
        if dora:  # the layers that the adapter leaves alone have a factor of one, and rounding
            assert_near(GPT2.outputs(slot.model), expected)
        else:
            assert torch.equal(GPT2.outputs(slot.model), expected)


def test_adapters_that_say_otherwise_about_fan_in_fan_out_are_the_same(tmp_path: Path) -> None:
    # PEFT corrects the field to what the base layer's class needs, and saves the corrected one
    path = GPT2.save(tmp_path, seed=1, r=2, target_modules=["c_attn"])
    config = path / "adapter_config.json"
    fields = json.loads(config.read_text())
    slot = prepare(GPT2.base(), envelope=Envelope(MAX_RANK, ["c_attn"]))
    for value in (True, False):
        config.write_text(json.dumps({**fields, "fan_in_fan_out": value}))
        commit(slot, path)
        check_fresh(GPT2, slot, path)


# --- biases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets"),
    [(LLAMA, LLAMA.targets), (CONVNET, ("line", "plane", "grouped", "space", "head"))],
    ids=["llama", "convnet"],
)
def test_adapters_with_and_without_lora_bias_share_a_slot(
    tmp_path: Path, family: Family, targets: tuple[str, ...]
) -> None:
    step = family.rank_step
    paths = [
        family.save(tmp_path / str(seed), seed=seed, r=r * step, target_modules=names, lora_bias=b)
        for seed, (r, names, b) in enumerate(
            [(1, list(targets), True), (2, list(targets[:2]), False), (2, list(targets[1:]), True)]
        )
    ]
    slot = prepare(family.base(), envelope=Envelope(MAX_RANK, list(targets), lora_bias=True))
    before = family.outputs(family.base())
    for path in (*paths, *paths[::-1]):
        commit(slot, path)
        check_fresh(family, slot, path)
    slot.commit(slot.stage(null_image(slot.layout)))
    assert torch.equal(family.outputs(slot.model), before)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert", "convnet"])
def test_adapters_replace_all_biases_some_or_none_in_one_slot(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    targets = list(family.targets)
    kinds = ("all", "none", "lora_only")
    paths = [
        family.save(tmp_path / bias, seed=seed, r=4, target_modules=targets[: 2 + seed], bias=bias)
        for seed, bias in enumerate(kinds)
    ]
    before = family.outputs(family.base())
    slot = prepare(family.base(), envelope=Envelope(MAX_RANK, targets, bias="all"))
    assert torch.equal(family.outputs(slot.model), before)
    for path in (*paths, *paths[::-1]):
        commit(slot, path)
        check_fresh(family, slot, path)
    slot.commit(slot.stage(null_image(slot.layout)))
    assert slot.revision == BASE
    assert torch.equal(family.outputs(slot.model), before)


def test_two_slots_that_both_want_biases_are_refused_by_name() -> None:
    envelope = Envelope(MAX_RANK, ["q_proj"], bias="lora_only")
    slot = prepare(QWEN2.base(), envelope=envelope, adapter_name="one")
    slot.model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    before = structure(slot.model)
    with pytest.raises(InvalidEnvelope, match="slot 'one' of this model holds") as caught:
        prepare(slot.model, envelope=envelope, adapter_name="two")
    assert caught.value.field == "bias"
    assert structure(slot.model) == before
    slot.verify()
    prepare(slot.model, envelope=Envelope(MAX_RANK, ["q_proj"]), adapter_name="two").verify()
    slot.verify()


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_model_with_trained_biases_over_its_own_is_refused_by_name(
    tmp_path: Path, bias: str
) -> None:
    path = QWEN2.save(tmp_path, seed=1, r=2, target_modules=["q_proj"], bias=bias)
    model = QWEN2.fresh(path)
    before, output = structure(model), QWEN2.outputs(model)
    for envelope in (None, Envelope(MAX_RANK, ["q_proj"], bias=bias)):
        with pytest.raises(NotPrepared, match=r"'default': .* overwritten the base model's own"):
            prepare(model, envelope=envelope)
    assert structure(model) == before
    assert torch.equal(QWEN2.outputs(model), output)


# --- several slots --------------------------------------------------------------------------


NAMES = ("default", "default_v2", "v2")


def test_slots_whose_names_contain_each_other_keep_apart_in_one_model(tmp_path: Path) -> None:
    targets, saved = ["q_proj", "down_proj"], ["lm_head"]
    paths = {
        (name, seed): LLAMA.save(
            tmp_path / f"{name}-{seed}",
            seed=10 * index + seed,
            r=2 + seed,
            target_modules=targets,
            modules_to_save=None if name == "v2" else saved,
            use_dora=name == "default_v2",
        )
        for index, name in enumerate(NAMES)
        for seed in (1, 2)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LLAMA.fresh(paths["default", 1])
        for name in NAMES[1:]:
            model.load_adapter(str(paths[name, 1]), name)
    slots = {}
    for name in NAMES:
        envelope = Envelope(
            MAX_RANK, targets, None if name == "v2" else saved, use_dora=name == "default_v2"
        )
        slots[name] = prepare(model, envelope=envelope, adapter_name=name)
    live = dict.fromkeys(NAMES, 1)

    def check() -> None:
        for name in NAMES:
            model.set_adapter(name)
            slots[name].verify()
            check_fresh(LLAMA, slots[name], paths[name, live[name]])

    check()
    for name, seed in (("default", 2), ("v2", 2), ("default_v2", 2), ("default", 1), ("v2", 1)):
        commit(slots[name], paths[name, seed])
        live[name] = seed
        check()


def test_slots_of_several_models_in_one_process_keep_apart(tmp_path: Path) -> None:
    paths = [LLAMA.save(tmp_path / str(r), seed=r, r=r, target_modules=["q_proj"]) for r in (2, 3)]
    slots = [prepare(LLAMA.base(), envelope=Envelope(MAX_RANK, ["q_proj"])) for _ in paths]
    for slot, path in zip(slots, paths, strict=True):
        commit(slot, path)
    for slot, path in zip(slots, paths, strict=True):
        check_fresh(LLAMA, slot, path)
        slot.verify()


def test_what_is_saved_from_one_of_several_slots_is_its_own(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    paths = {
        name: LLAMA.save(tmp_path / name, seed=i, r=i + 2, **config) for i, name in enumerate(NAMES)
    }
    model = LLAMA.fresh(paths["default"])
    for name in NAMES[1:]:
        model.load_adapter(str(paths[name]), name)
    envelope = Envelope(MAX_RANK, ["q_proj"], ["lm_head"])
    slots = {name: prepare(model, envelope=envelope, adapter_name=name) for name in NAMES}
    for name in NAMES:
        lifted = Adapter.from_peft_model(model, name, name="same")
        assert lifted.revision == load_adapter(paths[name], name="same").revision
        assert slots[name].revision.digest == lifted.revision.digest


# --- DoRA's cache ---------------------------------------------------------------------------


@pytest.fixture
def caching() -> Iterator[None]:
    assert not peft_dora.ENABLE_DORA_CACHING
    with DoraCaching():
        assert peft_dora.ENABLE_DORA_CACHING
        yield
    assert not peft_dora.ENABLE_DORA_CACHING


@pytest.mark.usefixtures("caching")
@pytest.mark.parametrize("family", [LLAMA, GPT2, CONVNET], ids=["llama", "gpt2", "convnet"])
def test_norms_that_peft_keeps_do_not_outlive_a_swap(family: Family, tmp_path: Path) -> None:
    targets = list(family.dora or family.targets)
    paths = [
        family.save(tmp_path / str(r), seed=r, r=r, target_modules=targets, use_dora=True)
        for r in (3, 6)
    ]
    before = family.outputs(family.base())
    slot = prepare(family.base(), envelope=Envelope(MAX_RANK, targets, use_dora=True))
    assert torch.equal(family.outputs(slot.model), before)
    for path in (*paths, *paths):
        commit(slot, path)
        for _ in range(2):  # the first pass fills the cache, the second reads it
            check_fresh(family, slot, path)
    slot.rollback()
    check_fresh(family, slot, paths[0])
    slot.commit(slot.stage(null_image(slot.layout)))
    assert torch.equal(family.outputs(slot.model), before)


# --- what has no place ----------------------------------------------------------------------


class Attention(torch.nn.Module):
    """PEFT puts a LoRA layer inside of another one here."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.head = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.attention(x, x, x)[0])
        return output


@pytest.mark.parametrize("targets", [["attention", "head"], ["attention"]])
def test_multihead_attention_is_refused_by_name_and_left_as_it_was(targets: list[str]) -> None:
    model, x = Attention().eval(), torch.ones(3, 8)
    before, output = structure(model), model(x)
    with pytest.raises(InvalidEnvelope, match=r"'attention.*MultiheadAttention") as caught:
        prepare(model, envelope=Envelope(4, targets))
    assert caught.value.field == "target_modules"
    assert structure(model) == before
    assert torch.equal(model(x), output)


class Experts(torch.nn.Module):
    """Bare parameters, as in transformers' mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Module()
        self.inner.weights = torch.nn.Parameter(torch.ones(2, 8, 8))
        self.head = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(x)
        return output


def _with_target_parameters() -> PeftModel:
    config = LoraConfig(r=2, target_modules=["head"], target_parameters=["inner.weights"])
    return get_peft_model(Experts(), config).eval()


def test_lora_on_bare_parameters_is_refused_by_name(tmp_path: Path) -> None:
    _with_target_parameters().save_pretrained(str(tmp_path))
    slot = prepare(Experts(), envelope=Envelope(4, ["head"]))
    with pytest.raises(FeatureOutsideEnvelope, match="target_parameters"):
        pack(tmp_path, slot.layout)


def test_a_model_with_lora_on_bare_parameters_is_refused_and_left_as_it_was() -> None:
    model = _with_target_parameters()
    before, output = structure(model), model(torch.ones(1, 8))
    for envelope in (None, Envelope(4, ["head"])):
        with pytest.raises((InvalidEnvelope, AdapterRefused), match=r"inner|target_parameters"):
            prepare(model, envelope=envelope)
        assert structure(model) == before
        assert torch.equal(model(torch.ones(1, 8)), output)


def test_lora_layers_inside_a_saved_module_are_refused_by_name(tmp_path: Path) -> None:
    # PEFT itself puts no LoRA into modules that the same adapter saves; another adapter's can be
    path = LLAMA.save(tmp_path, seed=1, r=2, target_modules=["q_proj"])
    model = LLAMA.fresh(path)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["down_proj"]))
    before, output = structure(model), LLAMA.outputs(model)
    envelope = Envelope(MAX_RANK, ["down_proj"], ["layers.0.self_attn"])
    with pytest.raises(InvalidEnvelope, match=r"LoRA targets inside '.*layers\.0\.self_attn'") as e:
        prepare(model, envelope=envelope, adapter_name="other")
    assert e.value.field == "modules_to_save"
    assert structure(model) == before
    assert torch.equal(LLAMA.outputs(model), output)


def test_a_saved_module_takes_the_lora_targets_inside_it(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["layers.0"]}
    paths = [LLAMA.save(tmp_path / str(r), seed=r, r=r, **config) for r in (2, 5)]
    envelope = Envelope(MAX_RANK, ["q_proj", "down_proj"], ["layers.0"])
    slot = prepare(LLAMA.base(), envelope=envelope)
    assert not [e.key for e in slot.layout.entries if "layers.0" in e.key and "lora" in e.key]
    for path in (*paths, paths[0]):
        commit(slot, path)
        check_fresh(LLAMA, slot, path)


@pytest.mark.parametrize(
    ("envelope", "field", "name"),
    [
        (Envelope(4, ["no_such_module"]), "target_modules", "no_such_module"),
        (Envelope(4, ["q_proj"], ["no_such_module"]), "modules_to_save", "no_such_module"),
        (Envelope(4, ["q_proj", "no_such_module"]), "target_modules", "no_such_module"),
    ],
)
def test_a_module_that_the_model_does_not_have_is_refused_by_name(
    envelope: Envelope, field: str, name: str
) -> None:
    model = LLAMA.base()
    before = structure(model)
    with pytest.raises(InvalidEnvelope, match=re.escape(name)) as caught:
        prepare(model, envelope=envelope)
    assert caught.value.field == field
    assert structure(model) == before
