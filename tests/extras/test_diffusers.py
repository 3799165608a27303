"""A diffusers model, and the code that replaces ``enable_lora_hotswap``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hotswap_lib import (
    Adapter,
    AdapterNotFound,
    Envelope,
    SlotTensorMoved,
    VerifyFailed,
    null_image,
    pack,
    prepare,
)
from tests.hotswap_lib.families import assert_near, pad, randomize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of diffusers' own imports
    pytest.importorskip("PIL", reason="diffusers needs pillow: see tests/extras/conftest.py")
    diffusers: Any = pytest.importorskip(
        "diffusers", reason="diffusers is not installed: see tests/extras/conftest.py"
    )

MAX_RANK = 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
ENVELOPE = Envelope(max_rank=MAX_RANK, target_modules=TARGETS)
CONFIGS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]},
    {"r": 8, "lora_alpha": 8, "target_modules": TARGETS},
    {"r": 4, "lora_alpha": 16, "target_modules": ["conv1", "to_out.0"], "use_rslora": True},
]


def build() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def pipeline(unet: Any) -> Any:
    """Of a pipeline only what loads LoRA weights, and the model that they are for."""
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def outputs(unet: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    words = torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        output: torch.Tensor = unet(
            noise, torch.tensor([3]), encoder_hidden_states=words, **arguments
        ).sample
    return output


def save_with_peft(folder: Path, seed: int, **config: Any) -> Path:
    model = get_peft_model(build(), LoraConfig(**config))
    randomize(model, seed)
    model.save_pretrained(str(folder))
    return folder


def save_with_diffusers(folder: Path, seed: int, **config: Any) -> Path:
    """One file, under diffusers' own keys, without an ``adapter_config.json``."""
    from peft import get_peft_model_state_dict

    unet = build()
    unet.add_adapter(LoraConfig(**config), "style")
    randomize(unet, seed)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="style"),
        unet_lora_adapter_metadata=unet.peft_config["style"].to_dict(),
    )
    return folder


def load_diffusers_lora(pipe: Any, path: Path, name: str) -> Adapter:
    """The recipe: diffusers reads whatever format it is, into an empty UNet."""
    state, alphas, metadata = pipe.lora_state_dict(
        str(path), return_lora_metadata=True, weight_name="pytorch_lora_weights.safetensors"
    )
    with torch.device("meta"):
        scratch = type(pipe.unet).from_config(pipe.unet.config)
    scratch.to_empty(device="cpu")  # memory that is never written to is never allocated
    pipe.load_lora_into_unet(state, alphas, scratch, adapter_name="x", metadata=metadata)
    return Adapter.from_peft_model(scratch, "x", name=name)


def test_adapters_that_peft_saved_swap_in_a_unet(tmp_path: Path) -> None:
    paths = [save_with_peft(tmp_path / str(i), i, **config) for i, config in enumerate(CONFIGS)]
    unet = build()
    before = outputs(unet)
    slot = prepare(unet, envelope=ENVELOPE)
    # the object that the pipeline has is the one that now has the slot
    assert torch.equal(outputs(unet), before)
    expected = []
    for path in paths:
        fresh = PeftModel.from_pretrained(build(), str(path)).eval()
        unpadded = outputs(fresh)
        pad(fresh, MAX_RANK)
        expected.append(outputs(fresh))
        assert_near(expected[-1], unpadded)
    for index in (0, 1, 2, 1, 0, 2):
        slot.commit(slot.stage(pack(paths[index], slot.layout)))
        slot.verify()
        assert torch.equal(outputs(unet), expected[index])
        assert torch.equal(outputs(slot.model), expected[index])
    slot.rollback()
    assert torch.equal(outputs(unet), expected[0])
    slot.commit(slot.stage(null_image(slot.layout)))
    assert torch.equal(outputs(unet), before)


def test_an_adapter_is_lifted_out_of_a_model_that_is_no_peft_model() -> None:
    trained = build()
    for seed, name in enumerate(("style", "style_v2")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, that there will be two of them
            trained.add_adapter(LoraConfig(**CONFIGS[seed]), name)
    randomize(trained, 7)
    unet = build()
    slot = prepare(unet, envelope=ENVELOPE)
    lifted = {name: Adapter.from_peft_model(trained, name) for name in ("style", "style_v2")}
    pad(trained, MAX_RANK)
    for name, adapter in lifted.items():
        slot.commit(slot.stage(pack(adapter, slot.layout)))
        slot.verify()
        trained.set_adapter(name)
        assert torch.equal(outputs(unet), outputs(trained))
    with pytest.raises(AdapterNotFound, match="style_v2"):
        Adapter.from_peft_model(trained, "other")


@pytest.mark.parametrize("config", CONFIGS, ids=["low", "wide", "rslora"])
def test_an_adapter_that_diffusers_loaded_is_lifted_out(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = save_with_diffusers(tmp_path, 3, **config)
    pipe = pipeline(build())
    pipe.load_lora_weights(
        str(path), weight_name="pytorch_lora_weights.safetensors", adapter_name="style"
    )
    unet = build()
    slot = prepare(unet, envelope=ENVELOPE)
    adapter = Adapter.from_peft_model(pipe.unet, "style")
    slot.commit(slot.stage(pack(adapter, slot.layout)))
    slot.verify()
    pad(pipe.unet, MAX_RANK)
    assert torch.equal(outputs(unet), outputs(pipe.unet))


def test_moving_from_diffusers_hotswap_gives_the_same_pictures(tmp_path: Path) -> None:
    # the first one has all targets and no smaller rank: diffusers can swap nothing else in
    configs = [CONFIGS[1], {**CONFIGS[1], "r": 4, "lora_alpha": 2}, {**CONFIGS[1], "r": 1}]
    paths = [save_with_diffusers(tmp_path / str(i), i, **c) for i, c in enumerate(configs)]
    file = "pytorch_lora_weights.safetensors"

    old = pipeline(build())
    old.enable_lora_hotswap(target_rank=MAX_RANK)
    old.load_lora_weights(str(paths[0]), weight_name=file, adapter_name="style")
    expected = [outputs(old.unet)]
    for path in paths[1:]:
        old.load_lora_weights(str(path), weight_name=file, adapter_name="style", hotswap=True)
        expected.append(outputs(old.unet))

    new = pipeline(build())
    slot = prepare(new.unet, envelope=ENVELOPE)
    for path, picture in zip(paths, expected, strict=True):
        adapter = load_diffusers_lora(new, path, name="style")
        slot.commit(slot.stage(pack(adapter, slot.layout)))
        slot.verify()
        assert torch.equal(outputs(new.unet), picture)


def test_the_recipe_takes_what_diffusers_hotswap_refuses(tmp_path: Path) -> None:
    pipe = pipeline(build())
    slot = prepare(pipe.unet, envelope=ENVELOPE)
    for seed in (0, 2, 1, 0):  # other targets each time
        path = save_with_diffusers(tmp_path / f"{seed}", seed, **CONFIGS[seed])
        adapter = load_diffusers_lora(pipe, path, name=f"style-{seed}")
        slot.commit(slot.stage(pack(adapter, slot.layout)))
        slot.verify()
        fresh = pipeline(build())
        fresh.load_lora_weights(str(path), weight_name="pytorch_lora_weights.safetensors")
        pad(fresh.unet, MAX_RANK)
        assert torch.equal(outputs(pipe.unet), outputs(fresh.unet))


def test_swaps_reach_a_compiled_unet_without_compiling_again(tmp_path: Path) -> None:
    paths = [save_with_peft(tmp_path / str(i), i, **config) for i, config in enumerate(CONFIGS)]
    unet = build()
    slot = prepare(unet, envelope=ENVELOPE)
    compiled = torch.compile(unet, backend="eager")
    outputs(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for path in paths:
            slot.commit(slot.stage(pack(path, slot.layout)))
            assert torch.equal(outputs(compiled), outputs(unet))
            slot.verify()


def test_a_scale_for_one_call_leaves_the_slot_as_it_was(tmp_path: Path) -> None:
    path = save_with_peft(tmp_path, 1, **CONFIGS[1])
    unet = build()
    slot = prepare(unet, envelope=ENVELOPE)
    slot.commit(slot.stage(pack(path, slot.layout)))
    full = outputs(unet)
    half = outputs(unet, cross_attention_kwargs={"scale": 0.5})
    fresh = PeftModel.from_pretrained(build(), str(path)).eval()
    pad(fresh, MAX_RANK)
    assert torch.equal(half, outputs(fresh.get_base_model(), cross_attention_kwargs={"scale": 0.5}))
    assert not torch.equal(half, full)
    assert torch.equal(outputs(unet), full)
    slot.verify()


def test_set_adapters_writes_over_the_slot_and_verify_says_so(tmp_path: Path) -> None:
    path = save_with_peft(tmp_path, 1, **CONFIGS[1])
    pipe = pipeline(build())
    slot = prepare(pipe.unet, envelope=ENVELOPE)
    slot.commit(slot.stage(pack(path, slot.layout)))
    pipe.unet.set_adapters("default", 0.5)
    with pytest.raises((SlotTensorMoved, VerifyFailed), match="scaling"):
        slot.verify()
