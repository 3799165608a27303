"""Models on several devices, without weights, and with weights that move between calls.

Torch's "meta" device is a second device that every machine has: tensors there have shapes and no
bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hotswap_lib import (
    BASE,
    Adapter,
    Envelope,
    FeatureOutsideEnvelope,
    HotswapError,
    InvalidEnvelope,
    LayoutMismatch,
    load_adapter,
    pack,
    prepare,
)

from .families import FAMILIES, Family, assert_near

# imported like this because it has no types
accelerate: Any = pytest.importorskip("accelerate")

MAX_RANK = 8
LLAMA = FAMILIES["llama"]


def split(*on_meta: str) -> Any:
    """The tiny Llama with some of its modules on the second device."""
    model = LLAMA.base()
    for name in on_meta:
        model.get_submodule(name).to("meta")
    return model


# What an envelope and its adapters have beyond matrices.
FEATURES: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "bias": {"bias": "all"},
}


def is_embedding(target: str) -> bool:
    return "embed" in target or target == "wte"


def structure(model: torch.nn.Module) -> list[tuple[str, ...]]:
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    tensors = [
        (name, str(tuple(p.shape)), str(p.device), str(p.dtype))
        for name, p in model.named_parameters()
    ]
    hooks = [(n, repr(vars(m)["_hf_hook"])) for n, m in model.named_modules() if has_hook(m)]
    return [*modules, *tensors, *hooks]


def has_hook(module: torch.nn.Module) -> bool:
    return "_hf_hook" in vars(module)


@pytest.mark.parametrize("dora", [False, True])
def test_there_is_one_block_and_one_copy_for_each_device(tmp_path: Path, dora: bool) -> None:
    config = {"r": 4, "target_modules": list(LLAMA.targets), "use_dora": dora}
    path = LLAMA.save(tmp_path, seed=1, **config)
    envelope = Envelope(MAX_RANK, list(LLAMA.targets), ["lm_head"], use_dora=dora)
    slot = prepare(split("model.layers.1", "lm_head"), envelope=envelope)
    assert [block.device for block in slot.layout.blocks] == ["cpu", "meta"]
    for entry in slot.layout.entries:
        away = ".layers.1." in entry.key or "lm_head" in entry.key
        assert slot.layout.blocks[entry.block].device == ("meta" if away else "cpu")
        assert slot.tensors[entry.key].is_meta == away
    image = pack(path, slot.layout)
    assert [block.nbytes for block in image.blocks] == [b.nbytes for b in slot.layout.blocks]
    receipt = slot.commit(slot.stage(image))
    assert receipt.copies == 2
    assert receipt.image_bytes == slot.layout.nbytes
    assert receipt.previous == BASE
    slot.verify()
    assert slot.rollback().copies == 2
    slot.verify()


def test_the_part_on_the_cpu_holds_what_an_unsplit_model_holds(tmp_path: Path) -> None:
    config = {"target_modules": list(LLAMA.targets), "modules_to_save": ["lm_head"]}
    paths = [LLAMA.save(tmp_path / str(r), seed=r, r=r, **config) for r in (3, 8)]
    envelope = Envelope(MAX_RANK, list(LLAMA.targets), ["lm_head"])
    whole = prepare(LLAMA.base(), envelope=envelope)
    parts = prepare(split("model.layers.0"), envelope=envelope)
    for path in (*paths, paths[0]):
        for slot in (whole, parts):
            slot.commit(slot.stage(pack(path, slot.layout)))
        here = [key for key, tensor in parts.tensors.items() if not tensor.is_meta]
        assert any("layers.1" in key for key in here)
        assert any("lm_head" in key for key in here)
        for key in here:
            assert torch.equal(parts.tensors[key], whole.tensors[key])
        parts.verify()


def test_the_fingerprint_knows_the_split_and_not_the_devices_names() -> None:
    envelope = Envelope(MAX_RANK, ["q_proj", "down_proj"])
    one = prepare(split("model.layers.1"), envelope=envelope).layout
    other = prepare(split("model.layers.0"), envelope=envelope).layout
    whole = prepare(LLAMA.base(), envelope=envelope).layout
    uneven = prepare(split("model.layers.1.mlp"), envelope=envelope).layout
    assert [b.device for b in one.blocks] == [b.device for b in other.blocks][::-1]
    assert one.fingerprint == other.fingerprint
    assert len({one.fingerprint, whole.fingerprint, uneven.fingerprint}) == 3


def test_an_image_for_a_split_model_fits_the_same_split_alone(tmp_path: Path) -> None:
    path = LLAMA.save(tmp_path, seed=1, r=4, target_modules=["q_proj"])
    envelope = Envelope(MAX_RANK, ["q_proj"])
    here = prepare(split("model.layers.1"), envelope=envelope)
    there = prepare(split("model.layers.0"), envelope=envelope)
    whole = prepare(LLAMA.base(), envelope=envelope)
    image = pack(path, here.layout)
    there.commit(there.stage(image))
    there.verify()
    with pytest.raises(LayoutMismatch):
        whole.stage(image)


# every family and every feature once; the rest of the matrix is slow
IN_SHORT = {
    ("llama", "dora"),
    ("qwen2", "bias"),
    ("gpt2", "lora-bias"),
    ("bert", "bias"),
    ("convnet", "dora"),
}


@pytest.mark.parametrize(
    ("family", "feature"),
    [
        pytest.param(
            FAMILIES[name],
            feature,
            id=f"{name}-{feature}",
            marks=[] if (name, feature) in IN_SHORT else pytest.mark.slow,
        )
        for name in FAMILIES
        for feature in FEATURES
    ],
)
def test_ci_packs_with_a_model_that_has_no_weights(
    family: Family, feature: str, tmp_path: Path
) -> None:
    extra = FEATURES[feature]
    saved = None if feature == "bias" else list(family.saved)
    targets = list((family.dora if feature == "dora" else None) or family.targets)
    if feature == "lora-bias":  # PEFT has no such thing for embeddings
        targets = [target for target in targets if not is_embedding(target)]
    envelope = Envelope(MAX_RANK, targets, saved, **extra)
    paths = {
        "plain": family.save(
            tmp_path / "plain", seed=1, r=family.rank_step, target_modules=targets[:2]
        ),
        "full": family.save(
            tmp_path / "full",
            seed=2,
            r=2 * family.rank_step,
            target_modules=targets,
            modules_to_save=saved,
            **extra,
        ),
    }
    weightless = prepare(family.base().to("meta"), envelope=envelope)
    real = prepare(family.base(), envelope=envelope)
    assert weightless.layout.fingerprint == real.layout.fingerprint
    assert {block.device for block in weightless.layout.blocks} == {"meta"}
    for name, path in paths.items():
        image = pack(without_base_weights(path), weightless.layout)
        for ours, theirs in zip(image.blocks, pack(path, real.layout).blocks, strict=True):
            assert bytes(ours.data) == bytes(theirs.data)
        real.commit(real.stage(image))
        real.verify()
        expected = family.outputs(family.fresh(path, padded_to=MAX_RANK))
        if (name, feature) == ("plain", "dora"):  # PEFT adds DoRA's parts up in another order
            assert_near(family.outputs(real.model), expected)
        else:
            assert torch.equal(family.outputs(real.model), expected)


def test_a_model_that_was_built_without_weights_packs_as_well(tmp_path: Path) -> None:
    path = LLAMA.save(tmp_path, seed=1, r=4, target_modules=["q_proj"])
    envelope = Envelope(MAX_RANK, list(LLAMA.targets))
    with torch.device("meta"):
        weightless = prepare(LLAMA.build(), envelope=envelope)
    real = prepare(LLAMA.base(), envelope=envelope)
    real.commit(real.stage(pack(path, weightless.layout)))
    real.verify()
    expected = LLAMA.outputs(LLAMA.fresh(path, padded_to=MAX_RANK))
    assert torch.equal(LLAMA.outputs(real.model), expected)


def without_base_weights(path: Path) -> Adapter:
    """An adapter without the embeddings that PEFT saved with it."""
    adapter = load_adapter(path)
    tensors = {k: v for k, v in adapter.tensors.items() if not k.endswith("base_layer.weight")}
    return Adapter(name=adapter.name, config=adapter.config, tensors=tensors)


def test_without_weights_a_carried_embedding_cannot_be_compared_and_is_refused(
    tmp_path: Path,
) -> None:
    family = FAMILIES["qwen2"]
    path = family.save(tmp_path, seed=1, r=2, target_modules=["embed_tokens"])
    layout = prepare(family.base().to("meta"), envelope=Envelope(MAX_RANK, ["embed_tokens"])).layout
    with pytest.raises(FeatureOutsideEnvelope, match="without the base model's weights"):
        pack(path, layout)


# What is offloaded, to where: the name of a module that then moves on every call → how.
Offload = Callable[[Any, Path], Any]
_EVERYWHERE = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def _to_memory(model: Any, _: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _to_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def _dispatch(device: str, *modules: str) -> Offload:
    def dispatch(model: Any, folder: Path) -> Any:
        device_map = {**_EVERYWHERE, **dict.fromkeys(modules, device)}
        return accelerate.dispatch_model(
            model, device_map, main_device="cpu", offload_dir=str(folder)
        )

    return dispatch


@pytest.mark.parametrize(
    ("offload", "envelope", "name"),
    [
        (_to_memory, Envelope(4, ["q_proj"]), "layers.0.self_attn.q_proj"),
        (_to_memory, Envelope(4, ["embed_tokens"]), "embed_tokens"),
        (_to_disk, Envelope(4, ["q_proj"]), "layers.0.self_attn.q_proj"),
        (_dispatch("disk", "model.layers.1"), Envelope(4, ["q_proj"]), "layers.1.self_attn.q_proj"),
        (_dispatch("disk", "lm_head"), Envelope(4, ["lm_head"]), "lm_head"),
        (_dispatch("disk", "lm_head"), Envelope(4, ["q_proj"], ["lm_head"]), "lm_head"),
        (_dispatch("disk", "lm_head"), Envelope(4, ["q_proj"], bias="all"), "lm_head"),
    ],
    ids=["memory", "embedding", "disk", "one-layer", "head", "saved", "bias"],
)
def test_an_offloaded_model_is_refused_by_name_and_left_as_it_was(
    tmp_path: Path, offload: Offload, envelope: Envelope, name: str
) -> None:
    base: Any = LLAMA.base()
    if envelope.bias != "none":
        base.lm_head.bias = torch.nn.Parameter(torch.ones(32))
    expected = LLAMA.outputs(base)
    model = offload(base, tmp_path)
    before = structure(model)
    with pytest.raises(InvalidEnvelope, match=rf"'(.*\.)?{re.escape(name)}.* is offloaded"):
        prepare(model, envelope=envelope)
    assert structure(model) == before
    assert not hasattr(model, "peft_config")
    assert torch.equal(LLAMA.outputs(model), expected)


def test_what_is_offloaded_elsewhere_in_the_model_does_no_harm(tmp_path: Path) -> None:
    path = LLAMA.save(tmp_path / "adapter", seed=1, r=4, target_modules=r".*layers\.0.*q_proj")
    model = _dispatch("disk", "model.layers.1", "lm_head")(LLAMA.base(), tmp_path / "weights")
    slot = prepare(model, envelope=Envelope(MAX_RANK, r".*layers\.0.*q_proj"))
    slot.commit(slot.stage(pack(path, slot.layout)))
    slot.verify()
    expected = LLAMA.outputs(LLAMA.fresh(path, padded_to=MAX_RANK))
    assert torch.equal(LLAMA.outputs(slot.model), expected)


def test_hooks_that_move_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    path = LLAMA.save(tmp_path, seed=1, r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    model: Any = LLAMA.base()
    hook = accelerate.hooks.AlignDevicesHook(torch.device("cpu"), io_same_device=True)
    accelerate.hooks.add_hook_to_module(model, hook)
    for module in (model.model.layers[0].self_attn.q_proj, model.model.norm):
        hook = accelerate.hooks.AlignDevicesHook(torch.device("cpu"))
        accelerate.hooks.add_hook_to_module(module, hook)
    slot = prepare(model, envelope=Envelope(MAX_RANK, ["q_proj"], ["norm"]))
    slot.commit(slot.stage(pack(path, slot.layout)))
    slot.verify()
    expected = LLAMA.outputs(LLAMA.fresh(path, padded_to=MAX_RANK))
    assert torch.equal(LLAMA.outputs(slot.model), expected)


def test_offloading_among_several_hooks_of_a_layer_is_seen() -> None:
    model = _to_memory(LLAMA.base(), Path())
    for layer in model.model.layers:
        hook = accelerate.hooks.AlignDevicesHook(io_same_device=True)
        accelerate.hooks.add_hook_to_module(layer.self_attn.q_proj, hook, append=True)
    with pytest.raises(InvalidEnvelope, match="is offloaded"):
        prepare(model, envelope=Envelope(4, ["q_proj"]))


def test_a_model_that_moves_as_a_whole_is_refused() -> None:
    model, _ = accelerate.cpu_offload_with_hook(LLAMA.base(), execution_device="cpu")
    with pytest.raises(HotswapError, match="offloaded"):
        prepare(model, envelope=Envelope(4, ["q_proj"]))
