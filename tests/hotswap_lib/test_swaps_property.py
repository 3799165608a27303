"""Any adapters inside an envelope, in any order, with rollbacks: always the same as PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hotswap_lib import BASE, Envelope, hotswap_adapter, prepare

from .families import FAMILIES, Family, assert_near


@st.composite
def envelopes(draw: st.DrawFn) -> tuple[Family, Envelope]:
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    use_dora, lora_bias = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    targets = family.dora if use_dora and family.dora else family.targets
    if lora_bias:  # PEFT has none on embeddings
        targets = tuple(name for name in targets if name not in family.embeddings)
    saved = draw(st.booleans())
    bias = draw(st.sampled_from(["none", "lora_only"] if saved else ["none", "lora_only", "all"]))
    return family, Envelope(
        max_rank=draw(st.sampled_from([4, 8])),
        target_modules=targets,
        modules_to_save=family.saved if saved else None,
        use_dora=use_dora,
        lora_bias=lora_bias,
        bias=bias,
    )


@st.composite
def adapters(draw: st.DrawFn, family: Family, envelope: Envelope) -> dict[str, Any]:
    """Arguments of Family.save for an adapter inside the envelope."""
    ranks = st.integers(1, envelope.max_rank // family.rank_step).map(family.rank_step.__mul__)
    targets = draw(st.lists(st.sampled_from(envelope.target_modules), min_size=1, unique=True))
    pattern = st.sampled_from([*targets, rf".*\.{targets[0]}"])
    return {
        "r": draw(ranks),
        "lora_alpha": draw(st.integers(1, 32)),
        "target_modules": targets,
        "rank_pattern": draw(st.dictionaries(pattern, ranks, max_size=1)),
        "alpha_pattern": draw(st.dictionaries(pattern, st.integers(1, 32), max_size=1)),
        "use_rslora": draw(st.booleans()),
        "use_dora": envelope.use_dora and draw(st.booleans()),
        "lora_bias": envelope.lora_bias and draw(st.booleans()),
        "bias": draw(st.sampled_from(sorted({"none", envelope.bias}))),
        "modules_to_save": draw(
            st.sampled_from([None, list(envelope.modules_to_save or ()) or None])
        ),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    }


@st.composite
def stories(draw: st.DrawFn) -> tuple[Family, Envelope, list[dict[str, Any]], list[Any]]:
    family, envelope = draw(envelopes())
    drawn = draw(st.lists(adapters(family, envelope), min_size=2, max_size=3))
    step = st.one_of(st.integers(0, len(drawn) - 1), st.just("rollback"))
    return family, envelope, drawn, draw(st.lists(step, min_size=3, max_size=7))


def with_examples(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes and tells little here
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


unmatched_patterns = pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys did not match:RuntimeWarning"
)


@unmatched_patterns
@with_examples(12)
@given(story=stories())
def test_any_sequence_of_swaps_is_bit_equal_to_padded_peft_models(
    tmp_path_factory: pytest.TempPathFactory, story: Any
) -> None:
    check_story(story, tmp_path_factory)


@pytest.mark.slow
@unmatched_patterns
@with_examples(60)
@given(story=stories())
def test_many_sequences_of_swaps_are_bit_equal_to_padded_peft_models(
    tmp_path_factory: pytest.TempPathFactory, story: Any
) -> None:
    check_story(story, tmp_path_factory)


def check_story(story: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    family, envelope, drawn, steps = story
    folder = tmp_path_factory.mktemp(family.name)
    paths: list[Path] = []
    padded, unpadded = {}, {}
    for index, config in enumerate(drawn):
        path = family.save(folder / f"adapter-{index}", seed=index, **config)
        paths.append(path)
        padded[path.name] = family.outputs(family.fresh(path, padded_to=envelope.max_rank))
        unpadded[path.name] = family.outputs(family.fresh(path))
    padded[BASE.name] = unpadded[BASE.name] = family.outputs(family.base())
    slot = prepare(family.base(), envelope=envelope)
    assert torch.equal(family.outputs(slot.model), padded[BASE.name])
    for step in [0, *steps]:
        if step == "rollback":
            slot.rollback()
        else:
            hotswap_adapter(slot.model, paths[step])
        slot.verify()
        output = family.outputs(slot.model)
        assert torch.equal(output, padded[slot.revision.name])
        # sums over more zeros may be grouped in another way
        assert_near(output, unpadded[slot.revision.name])
