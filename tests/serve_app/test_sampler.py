"""Temperature: greedy rows are left alone, the others follow the softmax."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from serve_app.sampler import Temperature

DRAWS = 20_000
# chi-square, 7 degrees of freedom: one in a thousand fair samplers is above this
CRITICAL = 24.3


def arguments(*temperatures: float | None) -> torch.Tensor:
    """The temperatures as they travel, with room for more requests behind them."""
    requests = [
        SimpleNamespace(
            state=SimpleNamespace(
                logit_processor_kwargs={} if value is None else {"temperature": value}
            )
        )
        for value in temperatures
    ]
    buffer = torch.full((len(requests) + 3,), 7, dtype=torch.int32)
    Temperature().fill_defaults(buffer)
    buffer[: len(requests)] = Temperature().prepare_tensor_args(requests)
    return buffer


def chi_square(drawn: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    wanted = expected.double() * len(drawn)
    return float(((counts - wanted) ** 2 / wanted).sum())


def test_a_batch_of_greedy_rows_comes_back_as_it_is() -> None:
    scores = torch.randn(3, 8)
    assert Temperature()(scores, arguments(0.0, None, 0.0)) is scores


def test_greedy_rows_beside_sampled_ones_are_not_touched() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 8)
    kept = scores.clone()
    result = Temperature()(scores, arguments(0.0, 1.0, 0.0, 0.7))
    assert torch.equal(result[[0, 2]], kept[[0, 2]])
    assert not torch.equal(result[[1, 3]], kept[[1, 3]])
    assert torch.equal(scores, kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_sampled_rows_follow_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(8)
    scores = logits.repeat(DRAWS, 1)
    drawn = Temperature()(scores, arguments(*[temperature] * DRAWS)).argmax(-1)
    assert chi_square(drawn, torch.softmax(logits / temperature, -1)) < CRITICAL


def test_another_temperature_would_have_been_noticed() -> None:
    torch.manual_seed(1)
    logits = torch.randn(8)
    drawn = Temperature()(logits.repeat(DRAWS, 1), arguments(*[1.0] * DRAWS)).argmax(-1)
    assert chi_square(drawn, torch.softmax(logits / 1.2, -1)) > CRITICAL


def test_a_temperature_near_zero_is_as_good_as_greedy() -> None:
    torch.manual_seed(2)
    scores = torch.randn(50, 8)
    drawn = Temperature()(scores, arguments(*[1e-6] * 50)).argmax(-1)
    assert torch.equal(drawn, scores.argmax(-1))


def test_half_precision_scores_stay_finite_where_they_are_drawn_from() -> None:
    torch.manual_seed(3)
    scores = torch.randn(200, 64).to(torch.bfloat16)
    result = Temperature()(scores, arguments(*[1.0] * 200))
    assert not result.isnan().any()
