"""Sampler: per-request sampling, forced tokens and log-probabilities in a batch.

The draw itself is tested in test_drawing.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from serve_app.engine.drawing import arguments, choose, draw_on_device, uniform
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs

GREEDY = SamplingParams(temperature=0.0)


class OnDevice(Sampler):
    """Runs on the host what an accelerator runs."""

    on_host = Sampler.on_device


both = pytest.mark.parametrize("kind", [Sampler, OnDevice])


def request(
    name: str, sampling: SamplingParams | None, *, prompt: int = 3, has_new_token: bool = True
) -> FutureRequestState:
    kwargs = {} if sampling is None else {"sampling": sampling}
    state = RequestState(name, list(range(prompt)), logit_processor_kwargs=kwargs)
    return FutureRequestState(
        state, has_new_token=has_new_token, complete_blocks={}, query_length=prompt
    )


def step(
    own: Sampler, requests: list[FutureRequestState], scores: torch.Tensor, columns: int = 32
) -> torch.Tensor:
    """One step as the manager does it; returns the scores whose argmax it takes."""
    storage = torch.empty((own.tensors_required, columns), dtype=torch.int32)
    own.fill_defaults(storage)
    own.prepare_tensor_args(requests_in_batch=requests, arg_storage=storage)
    result: torch.Tensor = own(torch.zeros(len(scores)), scores, storage[:, : len(scores)])
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=9),
        SamplingParams(seed=9, top_p=0.9),
        SamplingParams(seed=9, top_k=40, temperature=0.8),
    ],
)
def test_a_seeded_row_gets_the_same_token_in_any_batch(sampling: SamplingParams) -> None:
    scores = 2 * torch.randn(10, 5000, generator=torch.Generator().manual_seed(6))
    alone = [
        int(step(Sampler(max_logprobs=0), [request("me", sampling)], row[None].clone()).argmax())
        for row in scores
    ]
    others = [
        SamplingParams(),
        SamplingParams(top_p=0.5),
        GREEDY,
        SamplingParams(top_k=2000),
        SamplingParams(top_p=0.999),
    ]
    for place, token in enumerate(alone):
        batch = [request(f"r{row}", others[row % 5]) for row in range(10)]
        batch[place] = request("me", sampling)
        result = step(Sampler(max_logprobs=0), batch, scores.clone())
        assert int(result[place].argmax()) == token


def made_again(before: FutureRequestState) -> FutureRequestState:
    """The request after a full cache has turned its tokens into a part of its prompt."""
    state = before.state.create_equivalent_initial_request()
    assert state.generated_len() == 0
    return FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=7)


def test_a_request_whose_state_is_made_again_goes_on_with_the_same_numbers() -> None:
    before = request("me", SamplingParams(seed=3), prompt=4)
    before.state.generated_tokens = [11, 12, 13]
    own, storage = Sampler(max_logprobs=0), torch.empty((4, 8), dtype=torch.int32)
    first = own.prepare_tensor_args([before], storage).clone()
    assert torch.equal(own.prepare_tensor_args([made_again(before)], storage), first)


# ---- forced tokens -------------------------------------------------------------------------------


def assert_near(some: Sequence[TokenLogprobs], others: Sequence[TokenLogprobs]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.chosen == pytest.approx(other.chosen, rel=1e-5, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def forced(prompt: int, *tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(forced=(prompt, tokens), **more)


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_token_comes_whatever_the_scores_and_changes_no_other_row(
    kind: type[Sampler], temperature: float
) -> None:
    scores = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(9))
    worst = int(scores[1].argmin())
    others = [
        SamplingParams(seed=4, top_k=9, logprobs=2),
        GREEDY,
        SamplingParams(seed=5, logprobs=0),
    ]
    batch = [
        request("drawn", others[0]),
        request("forced", forced(3, worst, temperature=temperature, top_p=0.1, logprobs=1)),
        request("greedy", others[1]),
        request("silent", forced(3, 7, temperature=temperature)),
        request("also drawn", others[2]),
    ]
    own, alone = kind(max_logprobs=2), kind(max_logprobs=2)
    rows = [0, 2, 4]
    result = step(own, batch, scores.clone())
    undisturbed = step(alone, [batch[row] for row in rows], scores[rows].clone())
    tokens = result.argmax(-1)
    assert (int(tokens[1]), int(tokens[3])) == (worst, 7)
    assert torch.equal(result[rows], undisturbed)
    taken, expected = own.take(), torch.log_softmax(scores, -1)
    said = taken.pop("forced")
    assert said.chosen == pytest.approx(float(expected[1, worst]), abs=1e-5)
    assert said.top[0][0] == int(scores[1].argmax())
    others_taken = alone.take()
    assert list(taken) == list(others_taken)
    assert_near([*taken.values()], [*others_taken.values()])


@both
def test_a_batch_of_forced_rows_alone_is_forced_too(kind: type[Sampler]) -> None:
    own, scores = kind(max_logprobs=0), torch.randn(3, 8)
    batch = [request(str(row), forced(3, 5 - row)) for row in range(3)]
    assert step(own, batch, scores).argmax(-1).tolist() == [5, 4, 3]


@both
def test_the_largest_vocabulary_there_is_can_be_forced_token_by_token(kind: type[Sampler]) -> None:
    """Ids travel as float32, which has every whole number up to 2 ** 24."""
    own, last = kind(max_logprobs=0), 2**18 + 1
    for token in (0, 2**17 + 1, last):
        result = step(own, [request("me", forced(3, token))], torch.zeros(1, last + 1))
        assert int(result.argmax()) == token


@both
def test_a_token_that_the_model_rules_out_is_forced_and_has_no_logprob(kind: type[Sampler]) -> None:
    own, scores = kind(max_logprobs=0), torch.zeros(2, 8)
    scores[0, 3] = -math.inf
    scores[1] = -math.inf
    batch = [request(name, forced(3, 3, logprobs=0)) for name in "ab"]
    assert step(own, batch, scores).argmax(-1).tolist() == [3, 3]
    assert own.take() == {"a": TokenLogprobs(-9999.0), "b": TokenLogprobs(-9999.0)}


def test_the_place_of_a_forced_token_counts_the_prompt_and_survives_a_request_made_again() -> None:
    sampling = forced(4, 11, 12, 13, 14)
    before = request("me", sampling, prompt=4)
    for said, want in (([], 11), ([11], 12), ([11, 12, 13], 14)):
        before.state.generated_tokens = said
        for one in (before, made_again(before)):
            result = step(Sampler(max_logprobs=0), [one], torch.zeros(1, 20))
            assert int(result.argmax()) == want
    assert [sampling.forced_at(at) for at in (4, 7)] == [11, 14]
    assert SamplingParams().forced_at(4) is None


# ---- the manager's side --------------------------------------------------------------------------


def test_arguments_travel_as_the_bits_of_their_floats() -> None:
    own, storage = Sampler(max_logprobs=0), torch.full((4, 6), 7, dtype=torch.int32)
    batch = [
        request("a", SamplingParams(temperature=0.7, top_p=0.9, top_k=50, seed=1), prompt=5),
        request("still reading", SamplingParams(), has_new_token=False),
        request("greedy", None),
    ]
    args = own.prepare_tensor_args(batch, storage).view(torch.float32)
    u = uniform(SamplingParams(seed=1), 5)
    assert torch.equal(args[:, 0], torch.tensor([0.7, 0.9, 50, u]))
    assert args[0, 1] == 0
    assert not args[:, 2:].any()


def test_a_batch_without_a_new_token_has_no_arguments() -> None:
    own, storage = Sampler(max_logprobs=0), torch.full((4, 6), 7, dtype=torch.int32)
    assert not own.prepare_tensor_args([request("a", None, has_new_token=False)], storage).any()


def test_padding_rows_do_not_sample_as_an_earlier_batch_did() -> None:
    own, storage = Sampler(max_logprobs=0), torch.empty((4, 6), dtype=torch.int32)
    own.prepare_tensor_args([request(f"r{row}", SamplingParams()) for row in range(4)], storage)
    own.prepare_tensor_args([request("r0", SamplingParams())], storage)
    scores = torch.randn(4, 8)
    assert own(torch.zeros(4), scores.clone(), storage[:, :4])[1:].equal(scores[1:])


@both
def test_greedy_rows_come_back_bit_by_bit_and_drawn_rows_with_their_token_on_top(
    kind: type[Sampler],
) -> None:
    own = kind(max_logprobs=2)
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
    samplings = [GREEDY, SamplingParams(seed=1), None, SamplingParams(seed=2, top_p=0.5)]
    batch = [request(str(row), sampling) for row, sampling in enumerate(samplings)]
    result = step(own, batch, scores.clone())
    assert torch.equal(result[[0, 2]], scores[[0, 2]])
    used = [sampling or GREEDY for sampling in samplings]
    uniforms = [uniform(sampling, 3) for sampling in used]
    expected = choose(scores, used, uniforms)
    if kind is OnDevice:  # it sums in another order
        expected = draw_on_device(scores, arguments(used, uniforms, [None] * 4))[0].squeeze(-1)
    assert torch.equal(result.argmax(-1), expected)


def test_a_batch_of_greedy_rows_is_the_same_tensor() -> None:
    scores = torch.randn(3, 8)
    kept = scores.clone()
    result = step(Sampler(max_logprobs=20), [request(str(row), None) for row in range(3)], scores)
    assert result is scores
    assert torch.equal(result, kept)


@pytest.mark.parametrize(
    "kwargs",
    [{"temperature": 1.0}, {"sampling": 1.0}, {"sampling": SamplingParams(), "top_p": 0.5}],
)
def test_a_request_with_other_arguments_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"sampling=SamplingParams\(\.\.\.\)"):
        Sampler(max_logprobs=0).check_kwargs(kwargs)


def test_a_request_with_sampling_params_or_without_is_accepted() -> None:
    Sampler(max_logprobs=0).check_kwargs({})
    Sampler(max_logprobs=0).check_kwargs({"sampling": SamplingParams()})


# ---- log-probabilities ---------------------------------------------------------------------------


@both
def test_logprobs_are_those_of_the_raw_scores_for_requests_that_want_them(
    kind: type[Sampler],
) -> None:
    own = kind(max_logprobs=5)
    scores = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(8))
    batch = [
        request("drawn", SamplingParams(temperature=2, top_k=9, seed=4, logprobs=3)),
        request("silent", SamplingParams(seed=5)),
        request("greedy", SamplingParams(temperature=0, logprobs=5)),
        request("bare", SamplingParams(seed=6, logprobs=0)),
        request("greedy_silent", None),
    ]
    tokens = step(own, batch, scores.clone()).argmax(-1)
    taken, expected = own.take(), torch.log_softmax(scores, -1)
    assert list(taken) == ["drawn", "greedy", "bare"]
    for name, row, alternatives in (("drawn", 0, 3), ("greedy", 2, 5), ("bare", 3, 0)):
        best = expected[row].topk(alternatives)
        assert taken[name].chosen == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert [token for token, _ in taken[name].top] == best.indices.tolist()
        assert [value for _, value in taken[name].top] == pytest.approx(
            best.values.tolist(), rel=1e-5, abs=1e-5
        )
    assert own.take() == {}


def test_no_more_alternatives_are_named_than_are_allowed() -> None:
    own = Sampler(max_logprobs=2)
    step(own, [request("me", SamplingParams(logprobs=20))], torch.randn(1, 8))
    assert len(own.take()["me"].top) == 2


@both
def test_logprobs_never_hold_what_json_cannot_represent(kind: type[Sampler]) -> None:
    own = kind(max_logprobs=5)
    scores = torch.full((3, 4), -math.inf)
    scores[0, 2] = 1.0
    scores[2, 1] = math.nan
    batch = [request(str(row), SamplingParams(logprobs=5)) for row in range(3)]
    step(own, batch, scores)
    nothing = TokenLogprobs(chosen=-9999.0)
    taken = own.take()
    assert taken == {"0": TokenLogprobs(chosen=0.0, top=((2, 0.0),)), "1": nothing, "2": nothing}


def test_logprobs_that_were_not_taken_are_dropped_at_the_next_step() -> None:
    own = Sampler(max_logprobs=1)
    step(own, [request("old", SamplingParams(logprobs=1))], torch.randn(1, 8))
    step(own, [request("new", SamplingParams())], torch.randn(1, 8))
    assert own.take() == {}


def test_a_graph_finds_the_report_where_it_was() -> None:
    own = OnDevice(max_logprobs=1)
    step(own, [request("a", None)], torch.randn(1, 8))
    report = own.report
    step(own, [request("a", None), request("b", None)], torch.randn(2, 8))
    assert own.report is report
