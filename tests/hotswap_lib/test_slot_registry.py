from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from hotswap_lib import Adapter, Slot, hotswap_adapter, load_adapter, prepare

Adapters = dict[str, Path]


@pytest.mark.parametrize("name", ["attention", "patterns", "one-module"])
def test_save_pretrained_after_a_commit_writes_the_live_adapter_back(
    slot: Slot, tiny: Any, adapters: Adapters, tmp_path: Path, name: str
) -> None:
    hotswap_adapter(slot.model, adapters["wide"])
    hotswap_adapter(slot.model, adapters[name])
    slot.model.save_pretrained(str(tmp_path))
    assert load_adapter(tmp_path).revision.digest == slot.revision.digest
    saved, original = (tiny.logits(tiny.peft_model(p)) for p in (tmp_path, adapters[name]))
    assert torch.equal(saved, original)


def test_the_null_adapter_saves_as_an_adapter_that_does_nothing(
    slot: Slot, tiny: Any, tmp_path: Path
) -> None:
    slot.model.save_pretrained(str(tmp_path))
    assert torch.equal(tiny.logits(tiny.peft_model(tmp_path)), tiny.logits(tiny.base()))


def test_an_adapter_copied_out_of_the_slot_is_the_one_that_went_in(
    slot: Slot, adapters: Adapters
) -> None:
    for name, path in adapters.items():
        hotswap_adapter(slot.model, path)
        assert Adapter.from_peft_model(slot.model, name=name).revision == slot.revision


def test_slots_die_with_their_model(tiny: Any) -> None:
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    gone = weakref.ref(slot.model)
    del slot
    gc.collect()
    assert gone() is None
