from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from hotswap_lib import (
    AdapterRefused,
    Envelope,
    InvalidEnvelope,
    MissingTensor,
    RankOverEnvelope,
    TargetOutsideEnvelope,
    inspect_adapter,
    load_adapter,
    pack,
    padding_cost,
    prepare,
    sketch_layout,
    suggest_envelope,
)

from .families import FAMILIES
from .test_swaps_property import stories

Adapters = dict[str, Path]


def test_an_adapter_tells_its_ranks_scalings_and_size(adapters: Adapters) -> None:
    found = inspect_adapter(adapters["patterns"])
    assert found.revision == load_adapter(adapters["patterns"]).revision
    assert set(found.ranks.values()) == {16, 4, 2}
    assert found.ranks["model.layers.1.mlp.down_proj"] == 2
    assert found.scalings["model.layers.0.mlp.down_proj"] == 64 / 4
    assert found.features == ("rank and alpha patterns",)
    assert found.dtypes == {"float32": found.nbytes}


def test_features_are_told_in_words(tmp_path: Path) -> None:
    path = FAMILIES["bert"].save(
        tmp_path / "all",
        seed=1,
        target_modules=["query"],
        use_dora=True,
        use_rslora=True,
        bias="lora_only",
        modules_to_save=["classifier"],
    )
    assert inspect_adapter(path).features == (
        "rsLoRA",
        "DoRA",
        "bias=lora_only",
        "saves classifier",
    )


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(story=stories())
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_the_suggested_envelope_takes_every_adapter_and_is_the_smallest(
    tmp_path_factory: pytest.TempPathFactory, story: Any
) -> None:
    family, _, drawn, _ = story
    folder = tmp_path_factory.mktemp(family.name)
    paths = [
        family.save(folder / f"adapter-{index}", seed=index, **config)
        for index, config in enumerate(drawn)
    ]
    envelope = suggest_envelope(paths)
    slot = prepare(family.base(), envelope=envelope)
    images = [pack(path, slot.layout) for path in paths]
    modules = {entry.module for entry in slot.layout.entries if entry.padding is not None}
    assert modules == {module for image in images for module in image.ranks}
    assert envelope.max_rank == max(rank for image in images for rank in image.ranks.values())
    sketched = sketch_layout([load_adapter(path) for path in paths], envelope)
    lora = [entry for entry in slot.layout.entries if entry.padding is not None]
    assert sum(entry.nbytes for entry in lora) == sum(
        entry.nbytes for entry in sketched.entries if entry.padding is not None
    )


def test_the_suggestion_names_targets_as_the_adapters_do_where_that_is_exact(
    adapters: Adapters,
) -> None:
    listed = suggest_envelope([adapters["attention"], adapters["rslora"]])
    assert listed.target_modules == ("k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    pattern = suggest_envelope([adapters["one-module"]])
    assert pattern.target_modules == ("model.layers.1.mlp.gate_proj",)


def test_one_size_smaller_refuses(tiny: Any, adapters: Adapters) -> None:
    paths = [adapters["attention"], adapters["patterns"]]
    envelope = suggest_envelope(paths)
    smaller = Envelope(max_rank=envelope.max_rank - 1, target_modules=envelope.target_modules)
    with pytest.raises(RankOverEnvelope):
        pack(adapters["patterns"], prepare(tiny.base(), envelope=smaller).layout)
    fewer = Envelope(max_rank=16, target_modules=["q_proj", "down_proj"])
    with pytest.raises(TargetOutsideEnvelope):
        pack(adapters["attention"], prepare(tiny.base(), envelope=fewer).layout)


def test_no_adapters_have_no_envelope() -> None:
    with pytest.raises(InvalidEnvelope):
        suggest_envelope([])


def test_an_adapter_without_lora_weights_is_refused(edit: Any) -> None:
    with pytest.raises(MissingTensor):
        inspect_adapter(edit("wide", tensors=lambda tensors: tensors.clear()))
    with pytest.raises(AdapterRefused):
        inspect_adapter("/no/such/adapter")


def test_the_cost_of_padding_adds_up_to_the_image(tiny: Any, adapters: Adapters) -> None:
    slot = prepare(tiny.base(), envelope=tiny.envelope)
    for path in adapters.values():
        cost = padding_cost(path, slot.layout)
        parts = (cost.own_bytes, cost.rank_bytes, cost.absent_bytes, cost.gap_bytes)
        assert sum(parts) == cost.image_bytes == slot.layout.nbytes
        stored = sum(t.numel() for t in load_adapter(path).tensors.values())
        scalings = len(inspect_adapter(path).scalings)
        assert cost.own_bytes == 4 * (stored + scalings)


def test_an_adapter_that_fills_the_envelope_costs_no_padding(tiny: Any, adapters: Adapters) -> None:
    envelope = Envelope(max_rank=8, target_modules="all-linear", dtype=torch.float32)
    cost = padding_cost(adapters["wide"], prepare(tiny.base(), envelope=envelope).layout)
    assert (cost.rank_bytes, cost.absent_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("family", "saved"), [("llama", "layers.1.mlp"), ("convnet", "norm"), ("bert", "classifier")]
)
def test_saved_modules_with_modules_or_counters_inside_are_suggested_and_costed(
    tmp_path: Path, family: str, saved: str
) -> None:
    kind = FAMILIES[family]
    config = {"r": 4, "target_modules": [kind.targets[0]], "modules_to_save": [saved, "score"]}
    path = kind.save(tmp_path, seed=1, **config)
    envelope = suggest_envelope([path])
    assert envelope.modules_to_save == (saved,)
    assert inspect_adapter(path).features == (f"saves {saved}",)
    pack(path, prepare(kind.base(), envelope=envelope).layout)
    cost = padding_cost(path, sketch_layout([load_adapter(path)], envelope))
    assert cost.rank_bytes == cost.absent_bytes == 0
