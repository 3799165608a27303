"""Drawing: rows follow the distribution that they ask for, on the host and on an accelerator."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from serve_app.engine import drawing
from serve_app.engine.drawing import choose, uniform
from serve_app.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
DRAWS = 8_000
# chi-square, 7 degrees of freedom: one in a thousand fair samplers is above this
CRITICAL = 24.3


def draw_on_host(
    scores: torch.Tensor, samplings: list[SamplingParams], uniforms: list[float]
) -> torch.Tensor:
    return choose(scores, samplings, uniforms)


def draw_on_device(
    scores: torch.Tensor, samplings: list[SamplingParams], uniforms: list[float]
) -> torch.Tensor:
    """The code that runs on an accelerator, on the host."""
    args = drawing.arguments(samplings, uniforms, [None] * len(samplings))
    return drawing.draw_on_device(scores, args)[0].squeeze(-1)


both = pytest.mark.parametrize("draw", [draw_on_host, draw_on_device])
Draw = Callable[[torch.Tensor, list[SamplingParams], list[float]], torch.Tensor]


def seeded(count: int) -> list[float]:
    return [uniform(SamplingParams(seed=1), position) for position in range(count)]


def grid(count: int) -> list[float]:
    return [(place + 0.5) / count for place in range(count)]


def chi_square(drawn: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    wanted = expected[expected > 0].double() * len(drawn)
    return float(((counts[expected > 0] - wanted) ** 2 / wanted).sum())


# ---- tokens -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_rows_follow_the_softmax_of_the_scaled_logits(draw: Draw, temperature: float) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1))
    sampling = SamplingParams(temperature=temperature)
    drawn = draw(logits.repeat(DRAWS, 1), [sampling] * DRAWS, seeded(DRAWS))
    assert chi_square(drawn, torch.softmax(logits / temperature, -1)) < CRITICAL
    assert chi_square(drawn, torch.softmax(logits / temperature / 1.4, -1)) > CRITICAL


@both
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(top_p=0.8),
        SamplingParams(top_k=4),
        SamplingParams(temperature=1.5, top_k=5, top_p=0.9),
        SamplingParams(temperature=0.7, top_k=3, top_p=0.6),
    ],
)
def test_filtered_rows_follow_what_the_warpers_of_transformers_leave(
    draw: Draw, sampling: SamplingParams
) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(3))
    drawn = draw(logits.repeat(DRAWS, 1), [sampling] * DRAWS, seeded(DRAWS))
    assert chi_square(drawn, warped(logits, sampling)) < CRITICAL


def warped(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The distribution that transformers' own `generate` draws from."""
    scores = logits.unsqueeze(0) / sampling.temperature
    ids = torch.zeros((1, 1), dtype=torch.long)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)[0]


@both
@pytest.mark.parametrize("top_k", [0, 1, 2, 17, 63, 64, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_tokens_that_can_come_are_those_of_the_warpers(
    draw: Draw, top_k: int, top_p: float
) -> None:
    """A grid of uniforms meets every token that is likely enough; none may be outside."""
    points = 1024
    for seed in range(3):
        logits = 2 * torch.randn(64, generator=torch.Generator().manual_seed(seed))
        sampling = SamplingParams(temperature=1.3, top_k=top_k, top_p=top_p)
        expected = warped(logits, sampling)
        drawn = draw(logits.repeat(points, 1), [sampling] * points, grid(points))
        can_come = set(torch.nonzero(expected).flatten().tolist())
        must_come = set(torch.nonzero(expected > 1.01 / points).flatten().tolist())
        assert must_come <= set(drawn.tolist()) <= can_come


@pytest.mark.parametrize("spread", [0.5, 3.0, 9.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.05), (0, 0.9), (0, 0.999), (50, 1), (50, 0.9)])
def test_a_large_vocabulary_keeps_exactly_what_the_warpers_keep(
    spread: float, top_k: int, top_p: float
) -> None:
    """Narrow and wide distributions: top_p fits into the first candidates, or it does not."""
    for seed in range(3):
        logits = spread * torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
        probs = logits.softmax(-1)
        drawing.keep_likeliest(probs.numpy(), top_k=top_k, top_p=top_p)
        kept, expected = probs > 0, warped(logits, SamplingParams(top_k=top_k, top_p=top_p)) > 0
        # a token at the edge may fall either way: the sums are rounded, in another order
        edge = kept != expected
        assert edge.sum() <= kept.sum() * 2e-4
        assert kept[logits.argmax()]


@both
def test_equals_at_the_edge_are_taken_in_the_order_of_the_vocabulary(draw: Draw) -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 0.0]).repeat(512, 1)
    samplings = {
        (2, 1.0): {1, 2},
        (3, 1.0): {1, 2, 3},
        (0, 0.4): {2},
        (0, 0.5): {1, 2},
        (1, 0.5): {2},
    }
    for (top_k, top_p), expected in samplings.items():
        sampling = SamplingParams(top_k=top_k, top_p=top_p)
        assert set(draw(scores, [sampling] * 512, grid(512)).tolist()) == expected
    flat = torch.zeros(1, 6)
    assert draw(flat, [SamplingParams(top_k=1)], [0.99]).tolist() == [0]


@both
def test_the_ends_of_the_interval_are_tokens_that_can_come(draw: Draw) -> None:
    scores = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for sampling in (
        SamplingParams(),
        SamplingParams(top_p=0.99),
        SamplingParams(top_k=3),
        SamplingParams(top_k=1),
    ):
        for u in (0.0, 1 - 2**-24, 1 - 2**-40, 1.0):
            assert draw(scores, [sampling], [u])[0] in (1, 2)


@both
@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-30])
def test_a_temperature_near_zero_is_as_good_as_greedy(draw: Draw, temperature: float) -> None:
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(2)) * 1e4
    for top_p in (1.0, 0.9):
        sampling = SamplingParams(temperature=temperature, top_p=top_p)
        assert torch.equal(draw(scores, [sampling] * 50, seeded(50)), scores.argmax(-1))


@both
def test_half_precision_scores_are_drawn_from_in_single_precision(draw: Draw) -> None:
    scores = torch.randn(200, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    samplings = [SamplingParams(top_p=0.9), SamplingParams()] * 100
    single = draw(scores.float(), samplings, seeded(200))
    assert torch.equal(draw(scores, samplings, seeded(200)), single)


@both
def test_a_row_without_a_finite_best_score_takes_its_argmax_and_changes_no_other(
    draw: Draw,
) -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    scores[1] = -math.inf
    scores[2, 5] = math.nan
    scores[3, 6] = math.inf
    for sampling in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=3)):
        drawn = draw(scores, [sampling] * 5, [0.7] * 5)
        assert drawn[1:4].tolist() == [0, 5, 6]
        alone = draw(scores[[0, 4]], [sampling] * 2, [0.7] * 2)
        assert torch.equal(drawn[[0, 4]], alone)


def test_choosing_leaves_the_scores_as_they_are() -> None:
    scores = torch.randn(2, 8)
    kept = scores.clone()
    choose(scores, [GREEDY, SamplingParams(top_p=0.5)], [0.1, 0.1])
    assert torch.equal(scores, kept)


# ---- seeds --------------------------------------------------------------------------------------


def test_a_uniform_is_fixed_by_seed_and_position_and_by_nothing_else() -> None:
    own = [uniform(SamplingParams(seed=5), position) for position in range(100)]
    assert own == [uniform(SamplingParams(seed=5, temperature=0.1), place) for place in range(100)]
    assert len(set(own)) == 100
    assert own != [uniform(SamplingParams(seed=6), position) for position in range(100)]
    assert uniform(SamplingParams(), 1) != uniform(SamplingParams(), 1)


def test_seeded_uniforms_are_below_one_in_single_precision_and_even() -> None:
    drawn = torch.tensor(seeded(DRAWS), dtype=torch.float32)
    assert bool(((drawn >= 0) & (drawn < 1)).all())
    assert chi_square((drawn * 8).long(), torch.full((8,), 1 / 8)) < CRITICAL
