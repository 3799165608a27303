"""Canaries: the private and undocumented parts of transformers still do what the engine needs.

A failure here names the part that changed. `serve_app.engine.transformers_internals` is then the
only module to adapt.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from serve_app.engine.transformers_internals import (
    LogitsHook,
    ManagerOutput,
    NewToken,
    SteppedManager,
    attention_layers,
    attention_of,
    mask_for,
    register_scheduler,
    set_layer_attention,
)
from tests.serve_app.fakes import NEVER_S, until

PROMPT = [3, 1, 4, 1, 5]
FORCED = 7
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

# ---- names and arguments ------------------------------------------------------------------------

CALLS: list[tuple[Any, str, set[str]]] = [
    # owner, name, arguments that the engine passes or receives
    (ContinuousBatchingManager, "__init__", {"generation_config", "continuous_batching_config"}),
    (ContinuousBatchingManager, "_generation_step", {"self"}),
    (ContinuousBatchingManager, "_generation_loop_body", {"batch_processor", "bootstrapping"}),
    (ContinuousBatchingManager, "add_request", {"request_id", "max_new_tokens", "streaming"}),
    (ContinuousBatchingManager, "cancel_request", {"request_id"}),
    (ContinuousBatchingManager, "register_result_handler", {"request_id", "callback"}),
    (ContinuousBatchingManager, "is_running", set()),
    (ContinuousBatchingManager, "pause", set()),
    (ContinuousBatchingManager, "start", set()),
    (ContinuousBatchingManager, "stop", {"block", "timeout", "hard_stop"}),
    (ContinuousBatchingManager, "warmup", set()),
    (ContinuousBatchProcessor, "_handle_request_error", {"error", "state"}),
    (FIFOScheduler, "schedule_batch", {"token_budget", "cache_budget"}),
    (FIFOScheduler, "_process_candidates", {"candidates"}),
    (FIFOScheduler, "add_waiting_request", {"state"}),
    (FIFOScheduler, "finish_request", {"request_id"}),
    (FIFOScheduler, "request_is_cancelled", {"request_id"}),
    (RequestState, "create_equivalent_initial_request", set()),
    (RequestState, "generated_len", set()),
    (ContinuousBatchingLogitsProcessorList, "check_kwargs", {"kwargs"}),
    (ContinuousBatchingLogitsProcessorList, "fill_defaults", {"int32_tensor"}),
    (
        ContinuousBatchingLogitsProcessorList,
        "prepare_tensor_args",
        {"requests_in_batch", "arg_storage"},
    ),
    (ContinuousBatchingLogitsProcessorList, "__call__", {"scores", "logits_processor_args"}),
]


@pytest.mark.parametrize(
    ("owner", "name", "arguments"), CALLS, ids=[f"{one.__name__}.{name}" for one, name, _ in CALLS]
)
def test_transformers_has_this_method_with_these_arguments(
    owner: Any, name: str, arguments: set[str]
) -> None:
    method = getattr(owner, name, None)
    assert callable(method), f"{owner.__name__} of transformers has no {name}() any more"
    found = set(inspect.signature(method).parameters)
    assert arguments <= found, f"{owner.__name__}.{name} takes other arguments now: {found}"


def test_a_result_has_tokens_an_error_and_an_end() -> None:
    fields = set(ManagerOutput.__dataclass_fields__)
    assert {"generated_tokens", "error"} <= fields, f"a result has other fields now: {fields}"
    assert not ManagerOutput("one").is_finished(), "a result that has just started is finished"


def test_a_request_that_starts_over_keeps_its_tokens_and_its_arguments() -> None:
    before = RequestState("one", [1, 2], max_new_tokens=10, logit_processor_kwargs={"a": 1})
    before.generated_tokens = [4, 5]
    again = before.create_equivalent_initial_request()
    assert (again.request_id, again.initial_tokens) == ("one", [1, 2, 4, 5]), "tokens got lost"
    assert (again.generated_len(), again.max_new_tokens) == (0, 8), "it counts another way now"
    assert again.to_generation_output().generated_tokens == [4, 5], "it forgot what it delivered"
    assert again.logit_processor_kwargs == {"a": 1}, "the arguments of the request got lost"


# ---- a running manager --------------------------------------------------------------------------


class Forcing(LogitsHook):
    """Makes every token `FORCED`."""

    def __init__(self) -> None:
        super().__init__(arguments=1)
        self.rows: list[NewToken] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        if "wrong" in kwargs:
            raise TypeError("a wrong argument")

    def prepare(self, rows: Sequence[NewToken], *, most: int, device: torch.device) -> torch.Tensor:
        assert len(rows) <= most
        self.rows += rows
        return torch.full((1, len(rows)), float(FORCED), device=device)

    def process(self, scores_BV: torch.Tensor, args_AB: torch.Tensor) -> torch.Tensor:
        for row, token in enumerate(args_AB[0].tolist()):
            scores_BV[row, int(token)] = float("inf")
        return scores_BV


class Counting(SteppedManager):
    """Counts iterations, and remembers the batch of each step."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.iterations = 0
        self.batches: list[tuple[list[str], list[str]]] = []  # all requests, with a new token

    def run_step(self) -> None:
        super().run_step()
        batch, new = self.last_batch(), self.last_batch(new_token=True)
        self.batches.append(([one.request_id for one in batch], [one.request_id for one in new]))

    def run_iteration(self) -> bool:
        self.iterations += 1
        return super().run_iteration()


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


@pytest.fixture
def manager() -> Iterator[Counting]:
    made = Counting(
        model=llama(),
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        config=ContinuousBatchingConfig(
            page_size=32,
            num_blocks=16,
            max_batch_tokens=32,
            max_requests_per_batch=4,
            use_async_batching=False,
            scheduler_type=register_scheduler(),
        ),
        logits=Forcing(),
    )
    made.start()
    yield made
    made.stop(block=True, timeout=NEVER_S, hard_stop=True)


class Results:
    """Requests of one manager, and their newest results."""

    def __init__(self, manager: SteppedManager) -> None:
        self._manager = manager
        self.newest: dict[str, ManagerOutput] = {}

    def ask(self, name: str, tokens: int, prompt: list[int] = PROMPT, **kwargs: Any) -> None:
        self._manager.register_result_handler(
            name, lambda output: self.newest.__setitem__(name, output)
        )
        self._manager.add_request(
            prompt, request_id=name, max_new_tokens=tokens, streaming=True, **kwargs
        )

    def tokens(self, name: str) -> int:
        return len(self.newest[name].generated_tokens) if name in self.newest else 0

    async def end(self, name: str) -> ManagerOutput:
        await until(
            lambda: name in self.newest and self.newest[name].is_finished(),
            f"transformers did not finish the request {name!r}",
        )
        return self.newest[name]


def story(manager: SteppedManager, run: Callable[[Results], Any]) -> None:
    async def main() -> None:
        await until(lambda: manager.batch_processor is not None, "there is no batch_processor")
        await run(Results(manager))

    asyncio.run(main())


def test_steps_and_iterations_go_through_the_methods_that_the_engine_overrides(
    manager: Counting,
) -> None:
    async def run(results: Results) -> None:
        results.ask("one", 3)
        await results.end("one")
        assert len(manager.batches) == 3, "transformers runs its steps in another way now"
        assert manager.iterations >= 3, "transformers runs its loop in another way now"

    story(manager, run)


def test_the_manager_takes_the_argmax_of_what_the_hook_returns(manager: Counting) -> None:
    async def run(results: Results) -> None:
        results.ask("one", 3)
        output = await results.end("one")
        assert output.generated_tokens == [FORCED] * 3, "the logits hook decides no more"
        rows = manager.logit_processor.rows
        assert {row.request_id for row in rows} == {"one"}
        positions = [row.position for row in rows]
        assert positions == [5, 6, 7], "the state of a request counts its tokens in another way"

    story(manager, run)


def test_arguments_of_a_request_reach_the_hook_or_fail_the_request(manager: Counting) -> None:
    async def run(results: Results) -> None:
        results.ask("good", 1, sampling="any value")
        await results.end("good")
        assert manager.logit_processor.rows[-1].kwargs == {"sampling": "any value"}
        results.ask("bad", 1, wrong=True)
        output = await results.end("bad")
        assert output.error == "a wrong argument", "check_kwargs is not called any more"

    story(manager, run)


def test_the_batch_names_its_requests_and_those_with_a_new_token(manager: Counting) -> None:
    async def run(results: Results) -> None:
        results.ask("long", 1, prompt=[1] * 50)  # two steps of 32 tokens
        await results.end("long")
        assert manager.batches == [(["long"], []), (["long"], ["long"])], (
            "requests_in_batch, state or has_new_token mean something else now"
        )

    story(manager, run)


def test_one_request_alone_is_scheduled_while_the_scheduler_is_set_to_it(
    manager: Counting,
) -> None:
    async def run(results: Results) -> None:
        with manager.pause():
            scheduler = manager.scheduler
            scheduler.only = "second"
            results.ask("first", 3)
            results.ask("second", 3)
        await results.end("second")
        assert results.tokens("first") == 0, "_process_candidates does not choose any more"
        assert scheduler.awaits_first_token("first"), "waiting_requests means something else now"
        assert not scheduler.awaits_first_token("second")
        scheduler.only = None
        await results.end("first")

    story(manager, run)


def test_a_restarted_request_goes_on_with_the_tokens_that_it_has(manager: Counting) -> None:
    async def run(results: Results) -> None:
        results.ask("one", 100)
        await until(lambda: results.tokens("one") > 2, "no tokens came")
        with manager.pause():
            manager.scheduler.restart_all()
            assert not manager.scheduler.active_requests, "finish_request leaves it active"
            assert manager.scheduler.awaits_first_token("one")
        output = await results.end("one")
        assert output.generated_tokens == [FORCED] * 100
        positions = [row.position for row in manager.logit_processor.rows]
        assert positions == list(range(5, 105)), "positions jump when a request starts over"

    story(manager, run)


def test_a_cancelled_request_is_known_to_be_out_of_the_batch(manager: Counting) -> None:
    async def run(results: Results) -> None:
        with manager.pause():
            results.ask("one", 400)
            assert manager.is_queued("one"), "input_queue holds something else now"
        await until(lambda: results.tokens("one") > 0, "no tokens came")
        assert not manager.is_queued("one")
        assert not manager.has_left("one"), "request_is_cancelled means something else now"
        manager.cancel_request("one")
        await until(lambda: manager.has_left("one"), "a cancelled request never leaves the batch")
        assert not manager.scheduler.has_pending_requests()
        manager.remove_result_handler("one")
        assert manager.output_router.result_handlers == {}, "result handlers are elsewhere now"

    story(manager, run)


def test_a_failed_request_gets_its_error_and_leaves_the_batch(manager: Counting) -> None:
    async def run(results: Results) -> None:
        results.ask("one", 400)
        await until(lambda: results.tokens("one") > 0, "no tokens came")
        with manager.pause():
            [state] = manager.scheduler.active_requests.values()
            manager.fail_request(state, ArithmeticError("a failure"))
            assert not manager.scheduler.has_pending_requests()
        output = await results.end("one")
        assert output.error == "a failure", "_handle_request_error delivers another result now"

    story(manager, run)


def test_the_cache_is_emptied_between_two_steps_if_no_request_is_active(manager: Counting) -> None:
    async def run(results: Results) -> None:
        results.ask("one", 400)
        await until(lambda: results.tokens("one") > 0, "no tokens came")
        assert not await asyncio.to_thread(manager.try_empty_cache)
        manager.cancel_request("one")
        await until(lambda: manager.has_left("one"), "a cancelled request never leaves the batch")
        assert await asyncio.to_thread(manager.try_empty_cache)
        results.ask("two", 2)
        await results.end("two")

    story(manager, run)


def test_a_probe_runs_like_a_request_and_its_output_can_be_dropped(manager: Counting) -> None:
    async def run(_: Results) -> None:
        with manager.pause():
            probe = manager.scheduler.add_probe()
        await until(lambda: not manager.scheduler.awaits_first_token(probe), "no probe ran")
        await until(
            lambda: not manager.output_router.output_queue.empty(),
            "output of a request without a handler goes elsewhere now",
        )
        manager.discard_output()
        assert manager.output_router.output_queue.empty()

    story(manager, run)


def test_an_exception_in_the_loop_ends_the_thread_and_is_known(
    manager: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> bool:
        raise ArithmeticError("the loop failed")

    async def run(_: Results) -> None:
        assert not manager.failed
        monkeypatch.setattr(manager, "run_iteration", fails)
        await until(
            lambda: manager.failed, "background_thread_status does not say that the thread ended"
        )
        await until(lambda: not manager.is_running(), "the thread did not end")

    story(manager, run)


def test_registering_the_scheduler_twice_is_the_same_as_once() -> None:
    assert register_scheduler() == register_scheduler()


# ---- attention ----------------------------------------------------------------------------------


def test_chosen_layers_call_the_attention_function_that_was_registered_for_them() -> None:
    model, ids = llama(), torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    layers = attention_layers(model)
    assert [layer.layer_idx for layer in layers] == [0, 1], "layer_idx means something else now"
    called: list[tuple[int, set[str]]] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        called.append((module.layer_idx, set(more)))
        return attention_of(model)(module, query, key, value, mask, **more)

    before = model.config._attn_implementation
    AttentionInterface.register("hotswap_test", attention)
    set_layer_attention(layers, "hotswap_test")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert [index for index, _ in called] == [0, 1], "layers ask for their attention another way"
    assert all("scaling" in more for _, more in called), "attention gets its scaling another way"
    assert model.config._attn_implementation == before, "the model itself was changed"


def test_a_model_whose_attention_cannot_be_chosen_has_no_layers_to_set() -> None:
    model = llama()
    model._supports_attention_backend = False
    assert attention_layers(model) == []


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3"])
def test_transformers_says_that_the_attention_of_common_models_can_be_chosen(name: str) -> None:
    found = getattr(transformers, f"{name}ForCausalLM")
    assert found._supports_attention_backend, f"{name}: _supports_attention_backend is gone"


def test_a_layer_finds_its_mask_among_those_of_a_model_with_several_kinds() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        **SIZES, layer_types=kinds, sliding_window=8, query_pre_attn_scalar=8
    )
    layers = attention_layers(transformers.Gemma3ForCausalLM(config))
    masks = {"full_attention": "full", "sliding_attention": "sliding"}
    found = {layer.layer_idx: mask_for(layer, masks) for layer in layers}
    assert found == {0: "sliding", 1: "full"}, "layer_types or layer_idx mean something else now"
    assert mask_for(layers[0], "one for all") == "one for all"


# ---- the logits hook by itself ------------------------------------------------------------------


def test_padding_rows_have_no_arguments_of_an_earlier_batch() -> None:
    hook, storage = Forcing(), torch.empty((1, 4), dtype=torch.int32)
    hook.fill_defaults(storage)
    assert not storage.any()

    def batch(*names: str) -> list[FutureRequestState]:
        return [
            FutureRequestState(
                RequestState(name, [1]), has_new_token=True, complete_blocks={}, query_length=1
            )
            for name in names
        ]

    hook.prepare_tensor_args(batch("a", "b", "c"), storage)
    args = hook.prepare_tensor_args(batch("a"), storage).view(torch.float32)
    assert args.tolist() == [[FORCED, 0, 0, 0]]
