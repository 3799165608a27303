from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hotswap_lib import (
    BASE,
    Adapter,
    AdapterImage,
    Envelope,
    ImageCorrupted,
    Slot,
    load_adapter,
    null_image,
    pack,
    prepare,
)
from hotswap_lib.image import as_tensor

Adapters = dict[str, Path]


def tensors_of(image: AdapterImage, slot: Slot) -> dict[str, torch.Tensor]:
    blocks = [as_tensor(block) for block in image.blocks]
    return {entry.key: entry.view(blocks[entry.block]) for entry in slot.layout.entries}


def test_weights_lie_at_their_entries_and_padding_is_zero(slot: Slot, adapters: Adapters) -> None:
    adapter = load_adapter(adapters["wide"])
    packed = tensors_of(pack(adapter, slot.layout), slot)
    for key, tensor in adapter.tensors.items():
        rank_dim = 0 if "lora_A" in key else 1
        inside = packed[key].narrow(rank_dim, 0, 8)
        assert torch.equal(inside, tensor)
        assert torch.count_nonzero(packed[key]) == torch.count_nonzero(inside)


def test_modules_that_the_adapter_leaves_alone_are_zero_with_scaling_zero(
    slot: Slot, adapters: Adapters
) -> None:
    for key, tensor in tensors_of(pack(adapters["attention"], slot.layout), slot).items():
        targeted = "q_proj" in key or "v_proj" in key
        assert bool(tensor.any()) == targeted, key


@pytest.mark.parametrize("name", ["wide", "attention", "rslora", "patterns", "one-module"])
def test_scalings_are_those_of_a_fresh_peft_model(
    slot: Slot, tiny: Any, adapters: Adapters, name: str
) -> None:
    packed = tensors_of(pack(adapters[name], slot.layout), slot)
    layers = {
        f"base_model.model.{key}.scaling": module.scaling["default"]
        for key, module in tiny.peft_model(adapters[name]).get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    for key, scaling in layers.items():
        assert packed[key].item() == pytest.approx(scaling, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_checkpoint_is_cast_into_the_slots_dtype(
    slot: Slot, adapters: Adapters, dtype: torch.dtype
) -> None:
    adapter = load_adapter(adapters["wide"])
    cast = Adapter(
        name="wide",
        config=adapter.config,
        tensors={key: tensor.to(dtype) for key, tensor in adapter.tensors.items()},
    )
    packed = tensors_of(pack(cast, slot.layout), slot)
    key, tensor = next(iter(cast.tensors.items()))
    assert torch.equal(packed[key][:8], tensor.to(torch.float32))


def test_packing_twice_gives_the_same_digest_and_another_alpha_another(
    slot: Slot, adapters: Adapters, edit: Callable[..., Path]
) -> None:
    image = pack(adapters["wide"], slot.layout)
    assert pack(adapters["wide"], slot.layout).digest == image.digest
    assert pack(edit("wide", config={"lora_alpha": 17}), slot.layout).digest != image.digest


def test_the_null_image_is_zero_and_is_the_base_revision(slot: Slot) -> None:
    image = null_image(slot.layout)
    assert image.revision == BASE
    assert image.nbytes == slot.layout.nbytes
    assert not any(block.any() for block in image.blocks)


def test_an_image_travels_out_of_band_and_its_copy_reads_the_same_memory(
    slot: Slot, adapters: Adapters
) -> None:
    image = pack(adapters["wide"], slot.layout)
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(image, protocol=5, buffer_callback=buffers.append)
    assert len(content) < 10_000
    copy = pickle.loads(content, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert (copy.digest, copy.revision) == (image.digest, image.revision)
    assert np.array_equal(copy.blocks[0], image.blocks[0])
    copy.check()


def test_an_image_is_read_only_wherever_it_went(slot: Slot, adapters: Adapters) -> None:
    image = pack(adapters["wide"], slot.layout)
    for one in (image, pickle.loads(pickle.dumps(image))):
        with pytest.raises(ValueError, match="read-only"):
            one.blocks[0][0] = 1


def test_read_only_memory_is_staged_without_a_copy_or_a_warning(
    slot: Slot, adapters: Adapters
) -> None:
    content = pickle.dumps(pack(adapters["wide"], slot.layout))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = pickle.loads(content)
        staged = slot.stage(image)
    assert staged.blocks[0].data_ptr() == image.blocks[0].ctypes.data
    del image
    slot.commit(staged)
    slot.verify()


@pytest.mark.parametrize("bit", [0, 12_345])
def test_one_flipped_bit_is_noticed_before_it_is_staged(
    slot: Slot, adapters: Adapters, bit: int
) -> None:
    image = pack(adapters["wide"], slot.layout)
    block = image.blocks[0].copy()
    block[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(ImageCorrupted):
        slot.stage(_with(image, blocks=(block,)))
    with pytest.raises(ImageCorrupted):
        slot.stage(_with(image, config={**image.config, "r": 3}))
    with pytest.raises(ImageCorrupted):
        slot.stage(_with(image, written=image.written[1:]))
    assert slot.revision == BASE


def _with(image: AdapterImage, **changes: Any) -> AdapterImage:
    fields = ("revision", "layout_fingerprint", "blocks", "config", "ranks", "written")
    arrived = {"arrived_as": image.digest}
    return AdapterImage(**{**{f: getattr(image, f) for f in fields}, **arrived, **changes})


def test_scalings_stay_float32_in_a_half_precision_slot(tiny: Any, adapters: Adapters) -> None:
    slot = prepare(tiny.base(), envelope=Envelope(max_rank=16, dtype="bfloat16"))
    packed = tensors_of(pack(adapters["patterns"], slot.layout), slot)
    assert {t.dtype for k, t in packed.items() if k.endswith("scaling")} == {torch.float32}
    assert {t.dtype for k, t in packed.items() if k.endswith("weight")} == {torch.bfloat16}
