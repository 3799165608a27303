"""Sampler: drawn rows follow what they asked for, greedy rows are left alone, seeds repeat."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from serve_app.engine import sampler
from serve_app.engine.sampler import Sampler, choose, uniform
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.conftest import new_slot

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
    """What an accelerator runs, here."""
    return sampler._draw_on_device(
        scores, sampler._arguments(samplings, uniforms, [None] * len(samplings))
    )[0].squeeze(-1)


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
    """One step as the manager does it; returns what its argmax is taken of."""
    storage = torch.empty((own.tensors_required, columns), dtype=torch.int32)
    own.fill_defaults(storage)
    own.prepare_tensor_args(requests_in_batch=requests, arg_storage=storage)
    result: torch.Tensor = own(torch.zeros(len(scores)), scores, storage[:, : len(scores)])
    return result


@contextmanager
def as_on_a_device(own: Sampler) -> Iterator[None]:
    own._on_host = own._on_device  # type: ignore[method-assign]
    yield
    del own._on_host


# what is drawn


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
        sampler._keep_likeliest(probs.numpy(), top_k=top_k, top_p=top_p)
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
def test_a_row_without_a_finite_best_score_takes_its_argmax_and_hurts_nobody(draw: Draw) -> None:
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


# seeds


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


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=9),
        SamplingParams(seed=9, top_p=0.9),
        SamplingParams(seed=9, top_k=40, temperature=0.8),
    ],
)
def test_a_seeded_row_gets_the_same_token_whatever_runs_beside_it(sampling: SamplingParams) -> None:
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


def test_a_request_whose_state_is_made_again_goes_on_with_the_same_numbers() -> None:
    before = request("me", SamplingParams(seed=3), prompt=4)
    before.state.generated_tokens = [11, 12, 13]
    after = FutureRequestState(
        before.state.create_equivalent_initial_request(),
        has_new_token=True,
        complete_blocks={},
        query_length=7,
    )
    assert after.state.generated_len() == 0
    own, storage = Sampler(max_logprobs=0), torch.empty((4, 8), dtype=torch.int32)
    first = own.prepare_tensor_args([before], storage).clone()
    assert torch.equal(own.prepare_tensor_args([after], storage), first)


# forced tokens


def forced(prompt: int, *tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(forced=(prompt, tokens), **more)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_token_comes_whatever_the_model_would_say_and_beside_it_nothing_changes(
    device: bool, temperature: float
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
    own, alone = Sampler(max_logprobs=2), Sampler(max_logprobs=2)
    rows = [0, 2, 4]
    with as_on_a_device(own) if device else nullcontext():
        result = step(own, batch, scores.clone())
    with as_on_a_device(alone) if device else nullcontext():
        undisturbed = step(alone, [batch[row] for row in rows], scores[rows].clone())
    tokens = result.argmax(-1)
    assert (int(tokens[1]), int(tokens[3])) == (worst, 7)
    assert torch.equal(result[rows], undisturbed)
    taken, expected = own.take(), torch.log_softmax(scores, -1)
    said = taken.pop("forced")
    assert said.chosen == pytest.approx(float(expected[1, worst]), abs=1e-5)
    assert said.top[0][0] == int(scores[1].argmax())
    assert taken == alone.take()


@pytest.mark.parametrize("device", [False, True])
def test_a_batch_of_forced_rows_alone_is_forced_too(device: bool) -> None:
    own, scores = Sampler(max_logprobs=0), torch.randn(3, 8)
    with as_on_a_device(own) if device else nullcontext():
        batch = [request(str(row), forced(3, 5 - row)) for row in range(3)]
        assert step(own, batch, scores).argmax(-1).tolist() == [5, 4, 3]


@pytest.mark.parametrize("device", [False, True])
def test_the_largest_vocabulary_there_is_can_be_forced_token_by_token(device: bool) -> None:
    """Ids travel as float32, which has every whole number up to 2 ** 24."""
    own, last = Sampler(max_logprobs=0), 2**18 + 1
    for token in (0, 2**17 + 1, last):
        with as_on_a_device(own) if device else nullcontext():
            scores = torch.zeros(1, last + 1)
            result = step(own, [request("me", forced(3, token))], scores)
        assert int(result.argmax()) == token


@pytest.mark.parametrize("device", [False, True])
def test_a_token_that_the_model_rules_out_is_forced_and_has_no_logprob(device: bool) -> None:
    own, scores = Sampler(max_logprobs=0), torch.zeros(2, 8)
    scores[0, 3] = -math.inf
    scores[1] = -math.inf
    with as_on_a_device(own) if device else nullcontext():
        batch = [request(name, forced(3, 3, logprobs=0)) for name in "ab"]
        assert step(own, batch, scores).argmax(-1).tolist() == [3, 3]
    assert own.take() == {"a": TokenLogprobs(-9999.0), "b": TokenLogprobs(-9999.0)}


def test_the_place_of_a_forced_token_counts_the_prompt_and_survives_a_request_made_again() -> None:
    sampling = forced(4, 11, 12, 13, 14)
    before = request("me", sampling, prompt=4)
    own, storage = Sampler(max_logprobs=0), torch.empty((4, 8), dtype=torch.int32)
    for said, want in (([], 11), ([11], 12), ([11, 12, 13], 14)):
        before.state.generated_tokens = said
        after = FutureRequestState(
            before.state.create_equivalent_initial_request(),
            has_new_token=True,
            complete_blocks={},
            query_length=7,
        )
        for one in (before, after):
            args = own.prepare_tensor_args([one], storage).view(torch.float32)
            assert (float(args[0, 0]), float(args[2, 0])) == (sampler._FORCED, want)
    assert [sampling.forced_at(at) for at in (4, 7)] == [11, 14]
    assert SamplingParams().forced_at(4) is None


# the manager's side


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


def test_a_batch_without_a_new_token_has_nothing_to_tell() -> None:
    own, storage = Sampler(max_logprobs=0), torch.full((4, 6), 7, dtype=torch.int32)
    assert not own.prepare_tensor_args([request("a", None, has_new_token=False)], storage).any()


def test_padding_rows_do_not_sample_as_an_earlier_batch_did() -> None:
    own, storage = Sampler(max_logprobs=0), torch.empty((4, 6), dtype=torch.int32)
    own.prepare_tensor_args([request(f"r{row}", SamplingParams()) for row in range(4)], storage)
    own.prepare_tensor_args([request("r0", SamplingParams())], storage)
    scores = torch.randn(4, 8)
    assert own(torch.zeros(4), scores.clone(), storage[:, :4])[1:].equal(scores[1:])


@pytest.mark.parametrize("device", [False, True])
def test_greedy_rows_come_back_bit_by_bit_and_drawn_rows_with_their_token_on_top(
    device: bool,
) -> None:
    own = Sampler(max_logprobs=2)
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
    samplings = [GREEDY, SamplingParams(seed=1), None, SamplingParams(seed=2, top_p=0.5)]
    batch = [request(str(row), sampling) for row, sampling in enumerate(samplings)]
    if device:
        with as_on_a_device(own):
            result = step(own, batch, scores.clone())
    else:
        result = step(own, batch, scores.clone())
    assert torch.equal(result[[0, 2]], scores[[0, 2]])
    draw = draw_on_device if device else draw_on_host
    used = [sampling or GREEDY for sampling in samplings]
    uniforms = [uniform(sampling, 3) for sampling in used]
    assert torch.equal(result.argmax(-1), draw(scores, used, uniforms))


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
def test_a_request_with_anything_but_a_sampling_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"sampling=SamplingParams\(\.\.\.\)"):
        Sampler(max_logprobs=0).check_kwargs(kwargs)


def test_a_request_with_a_sampling_or_with_nothing_is_taken() -> None:
    Sampler(max_logprobs=0).check_kwargs({})
    Sampler(max_logprobs=0).check_kwargs({"sampling": SamplingParams()})


# log-probabilities


@pytest.mark.parametrize("device", [False, True])
def test_logprobs_are_those_of_the_raw_scores_for_whoever_asked(device: bool) -> None:
    own = Sampler(max_logprobs=5)
    scores = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(8))
    batch = [
        request("drawn", SamplingParams(temperature=2, top_k=9, seed=4, logprobs=3)),
        request("silent", SamplingParams(seed=5)),
        request("greedy", SamplingParams(temperature=0, logprobs=5)),
        request("bare", SamplingParams(seed=6, logprobs=0)),
        request("greedy_silent", None),
    ]
    if device:
        with as_on_a_device(own):
            tokens = step(own, batch, scores.clone()).argmax(-1)
    else:
        tokens = step(own, batch, scores.clone()).argmax(-1)
    taken, expected = own.take(), torch.log_softmax(scores, -1)
    assert list(taken) == ["drawn", "greedy", "bare"]
    for name, row, alternatives in (("drawn", 0, 3), ("greedy", 2, 5), ("bare", 3, 0)):
        best = expected[row].topk(alternatives)
        assert taken[name].chosen == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert [token for token, _ in taken[name].top] == best.indices.tolist()
        assert [value for _, value in taken[name].top] == pytest.approx(best.values.tolist())
    assert own.take() == {}


def test_no_more_alternatives_are_named_than_are_allowed() -> None:
    own = Sampler(max_logprobs=2)
    step(own, [request("me", SamplingParams(logprobs=20))], torch.randn(1, 8))
    assert len(own.take()["me"].top) == 2


@pytest.mark.parametrize("device", [False, True])
def test_logprobs_never_hold_what_json_cannot_say(device: bool) -> None:
    own = Sampler(max_logprobs=5)
    scores = torch.full((3, 4), -math.inf)
    scores[0, 2] = 1.0
    scores[2, 1] = math.nan
    batch = [request(str(row), SamplingParams(logprobs=5)) for row in range(3)]
    if device:
        with as_on_a_device(own):
            step(own, batch, scores)
    else:
        step(own, batch, scores)
    nothing = TokenLogprobs(chosen=-9999.0)
    taken = own.take()
    assert taken == {"0": TokenLogprobs(chosen=0.0, top=((2, 0.0),)), "1": nothing, "2": nothing}


def test_a_step_that_nobody_took_from_is_forgotten_by_the_next() -> None:
    own = Sampler(max_logprobs=1)
    step(own, [request("old", SamplingParams(logprobs=1))], torch.randn(1, 8))
    step(own, [request("new", SamplingParams())], torch.randn(1, 8))
    assert own.take() == {}


def test_a_graph_finds_the_report_where_it_was() -> None:
    own = Sampler(max_logprobs=1)
    with as_on_a_device(own):
        step(own, [request("a", None)], torch.randn(1, 8))
        report = own._report
        step(own, [request("a", None), request("b", None)], torch.randn(2, 8))
    assert own._report is report


# what transformers must keep for all this to hold


def test_a_running_manager_repeats_a_seeded_answer_alone_and_in_company(world: TinyWorld) -> None:
    prompt, seeded = [5, 6, 7, 8], SamplingParams(seed=1, temperature=1.5)
    others = [
        SamplingParams(),
        None,
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=3, logprobs=2),
    ]
    manager = new_slot(world).model.base_model.model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=32, num_blocks=16, max_batch_tokens=64, max_requests_per_batch=8
        ),
    )
    manager.logit_processor = Sampler(max_logprobs=2)
    manager.start()
    try:

        def ask(name: str, sampling: SamplingParams | None) -> None:
            kwargs = {} if sampling is None else {"sampling": sampling}
            manager.add_request(prompt, request_id=name, max_new_tokens=12, **kwargs)

        def answer(name: str) -> list[int]:
            while (output := manager.get_result(timeout=60)).request_id != name:
                assert output.error is None
            return list(output.generated_tokens)

        ask("alone", seeded)
        alone = answer("alone")
        for place, sampling in enumerate(others):
            ask(f"other{place}", sampling)
        ask("again", seeded)
        assert answer("again") == alone
        ask("another seed", SamplingParams(seed=2, temperature=1.5))
        assert answer("another seed") != alone
    finally:
        manager.stop(block=True, timeout=10, hard_stop=True)


def test_the_list_of_processors_has_the_methods_that_the_sampler_replaces() -> None:
    for name in ("check_kwargs", "fill_defaults", "prepare_tensor_args", "__call__"):
        theirs = getattr(ContinuousBatchingLogitsProcessorList, name, None)
        assert theirs is not None, f"transformers' processor list has no {name} any more"
        parameters = list(inspect.signature(theirs).parameters)
        assert parameters == list(inspect.signature(getattr(Sampler, name)).parameters) or (
            name == "__call__" and len(parameters) == 4
        ), f"transformers' processor list takes other arguments in {name}: {parameters}"


def test_the_manager_still_asks_the_list_what_the_sampler_answers() -> None:
    runs, stores = inspect.getsource(ModelRunner), inspect.getsource(ContinuousBatchingIOs)
    assert "self.logit_processor.do_processing" in runs, "do_processing is not asked any more"
    assert "torch.argmax(" in runs, "the manager does not take the argmax of the scores any more"
    assert "logit_processor.tensors_required" in stores, "tensors_required is not asked any more"
    assert "logit_processor.fill_defaults(" in stores, "fill_defaults is not called any more"
    assert "logits_processors.prepare_tensor_args(" in stores, (
        "prepare_tensor_args is not called before each step any more"
    )


def test_a_request_state_has_what_the_sampler_reads() -> None:
    state = RequestState("me", [1, 2], logit_processor_kwargs={"sampling": SamplingParams(seed=1)})
    state.generated_tokens = [3]
    again = state.create_equivalent_initial_request()
    assert again.request_id == "me"
    assert again.logit_processor_kwargs == state.logit_processor_kwargs, "sampling got lost"
    for one in (state, again):
        length = len(one.initial_tokens) + one.generated_len()
        assert length == 3, "a state made again counts its tokens in another way: seeds would jump"
