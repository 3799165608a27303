from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hotswap_lib import (
    AdapterImage,
    Envelope,
    ImageCorrupted,
    ImageUnreadable,
    LayoutMismatch,
    Slot,
    load_image,
    pack,
    prepare,
    save_image,
)
from hotswap_lib.memory import ALIGNMENT

from .families import FAMILIES

Adapters = dict[str, Path]


@pytest.fixture
def image(slot: Slot, adapters: Adapters) -> AdapterImage:
    return pack(adapters["patterns"], slot.layout)


def test_a_loaded_image_is_the_saved_one_and_commits_alike(
    tiny: Any, slot: Slot, image: AdapterImage, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_image(image, tmp_path / "patterns.image")
    loaded = load_image(tmp_path / "patterns.image")
    assert loaded.digest == image.digest
    assert (loaded.revision, loaded.config, loaded.ranks) == (
        image.revision,
        image.config,
        image.ranks,
    )
    slot.commit(slot.stage(loaded))
    slot.verify()
    assert torch.equal(tiny.logits(slot.model), expected["patterns"])


def test_the_blocks_are_mapped_and_aligned_and_read_only(
    image: AdapterImage, tmp_path: Path
) -> None:
    save_image(image, tmp_path / "image")
    (block,) = load_image(tmp_path / "image").blocks
    assert not block.flags.owndata
    assert not block.flags.writeable
    assert block.ctypes.data % ALIGNMENT == 0
    owner: Any = block
    while not isinstance(owner, np.memmap):  # ends in an AttributeError if it was never mapped
        owner = owner.base


def test_the_file_is_an_ordinary_safetensors_file(image: AdapterImage, tmp_path: Path) -> None:
    save_image(image, tmp_path / "image")
    with safe_open(str(tmp_path / "image"), "np") as file:
        assert np.array_equal(file.get_tensor("block.0"), image.blocks[0])
        assert json.loads(file.metadata()["image"])["revision"][0] == "patterns"


def test_the_gaps_of_an_image_are_filled_by_the_slot_that_takes_it(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    envelope = Envelope(
        max_rank=4,
        target_modules=family.targets,
        modules_to_save=family.saved,
        use_dora=True,
        bias="lora_only",
    )
    path = family.save(tmp_path / "plain", seed=1, r=4, target_modules=["query"])
    elsewhere = prepare(family.base(), envelope=envelope)
    save_image(pack(path, elsewhere.layout), tmp_path / "image")
    slot = prepare(family.base(), envelope=envelope)
    slot.commit(slot.stage(load_image(tmp_path / "image")))
    expected = family.outputs(family.fresh(path, padded_to=4))
    assert torch.equal(family.outputs(slot.model), expected)


def test_an_image_of_another_model_is_refused_by_its_fingerprint(
    tiny: Any, image: AdapterImage, tmp_path: Path
) -> None:
    save_image(image, tmp_path / "image")
    other = prepare(tiny.base(), envelope=Envelope(max_rank=8))
    with pytest.raises(LayoutMismatch):
        other.stage(load_image(tmp_path / "image"))


def test_a_flipped_bit_in_the_file_is_noticed_before_it_is_staged(
    slot: Slot, image: AdapterImage, tmp_path: Path
) -> None:
    save_image(image, tmp_path / "image")
    raw = bytearray((tmp_path / "image").read_bytes())
    raw[-100] ^= 1
    (tmp_path / "image").write_bytes(raw)
    with pytest.raises(ImageCorrupted):
        slot.stage(load_image(tmp_path / "image"))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _absent(path: Path) -> None:
    path.unlink()


def _of_another_kind(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"block.0": torch.zeros(4)}, path)


def _without_a_field(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"layout_fingerprint", b"layout_fingerprunt"))


@pytest.mark.parametrize(
    "break_it", [_truncated, _empty, _absent, _of_another_kind, _without_a_field]
)
def test_a_file_that_is_no_image_is_refused_by_its_path(
    image: AdapterImage, tmp_path: Path, break_it: Callable[[Path], None]
) -> None:
    path = tmp_path / "image"
    save_image(image, path)
    break_it(path)
    with pytest.raises(ImageUnreadable) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_saving_replaces_the_file_and_leaves_an_image_that_is_in_use_alone(
    slot: Slot, image: AdapterImage, adapters: Adapters, tmp_path: Path
) -> None:
    save_image(image, tmp_path / "image")
    in_use = slot.stage(load_image(tmp_path / "image"))
    save_image(pack(adapters["wide"], slot.layout), tmp_path / "image")
    slot.commit(in_use)
    slot.verify()
    assert np.array_equal(in_use.blocks[0].numpy(), image.blocks[0])
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
