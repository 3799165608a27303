from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from hotswap_lib import Envelope, Slot, prepare
from hotswap_lib.layout import Padding, Place, lay_out
from hotswap_lib.memory import ALIGNMENT

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def place(key: str, *, dtype: str = "float32", device: str = "cpu") -> Place:
    return Place(
        key=key, module=key, role="lora_A.weight", shape=(3, 5), dtype=dtype, device=device,
        padding=Padding(dim=0, max_rank=3),
    )  # fmt: skip


def test_entries_carry_checkpoint_keys_and_padded_shapes(slot: Slot) -> None:
    entry = next(entry for entry in slot.layout.entries if entry.key == Q_A)
    assert entry.module == "model.layers.0.self_attn.q_proj"
    assert (entry.shape, entry.dtype) == ((16, 32), "float32")
    assert entry.padding == Padding(dim=0, max_rank=16)


def test_every_layer_has_two_weights_and_a_scaling(slot: Slot) -> None:
    assert len(slot.layout.entries) == 3 * 14
    assert sum(entry.is_scaling for entry in slot.layout.entries) == 14


def test_entries_are_aligned_and_do_not_overlap(slot: Slot) -> None:
    end = 0
    for entry in slot.layout.entries:
        assert entry.offset % ALIGNMENT == 0
        assert entry.offset >= end
        end = entry.offset + entry.nbytes
    assert end <= slot.layout.nbytes == slot.layout.blocks[0].nbytes


def test_each_device_has_one_block_with_its_dtypes_in_a_row() -> None:
    places = [
        place("a", dtype="float32"),
        place("b", dtype="bfloat16", device="meta"),
        place("c", dtype="bfloat16"),
        place("d", dtype="float32"),
    ]
    layout = lay_out(places, Envelope(max_rank=3), base_model=None)
    assert [block.device for block in layout.blocks] == ["cpu", "meta"]
    assert [(e.key, e.block, e.offset) for e in layout.entries] == [
        ("c", 0, 0),
        ("a", 0, 64),
        ("d", 0, 128),
        ("b", 1, 0),
    ]


def test_a_view_is_the_entrys_memory_and_no_view_to_autograd(slot: Slot) -> None:
    arena = torch.zeros(slot.layout.nbytes, dtype=torch.uint8)
    entry = slot.layout.entries[1]
    view = entry.view(arena)
    view.fill_(1.0)
    assert view.data_ptr() == arena.data_ptr() + entry.offset
    assert not view._is_view()
    assert torch.count_nonzero(arena[entry.offset : entry.offset + entry.nbytes])


def test_a_layout_pickles_and_keeps_its_fingerprint(slot: Slot) -> None:
    copy = pickle.loads(pickle.dumps(slot.layout))
    assert copy == slot.layout
    assert copy.fingerprint == slot.layout.fingerprint
    assert len(pickle.dumps(slot.layout)) < 20_000


def test_the_fingerprint_ignores_where_it_runs_and_what_the_base_is_called(slot: Slot) -> None:
    block = slot.layout.blocks[0]
    elsewhere = dataclasses.replace(
        slot.layout,
        blocks=(dataclasses.replace(block, device="cuda:1"),),
        base_model="/another/path",
    )
    assert elsewhere.fingerprint == slot.layout.fingerprint


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope(max_rank=8),
        Envelope(max_rank=16, target_modules=["q_proj"]),
        Envelope(max_rank=16, dtype="bfloat16"),
    ],
)
def test_another_rank_target_or_dtype_is_another_fingerprint(
    slot: Slot, envelope: Envelope, tiny: Any
) -> None:
    assert prepare(tiny.base(), envelope=envelope).layout.fingerprint != slot.layout.fingerprint
