"""Every private or undocumented part of transformers that the engine uses, in one place.

The public API of continuous batching submits requests and returns tokens. It cannot run a step
under a lock, run one request of a batch alone, empty the prefix cache, say when a cancelled request
is out of the batch, or sample each request by its own seed.

tests/serve_app/engine/test_transformers_internals.py has a test for each part. It fails with a
sentence that names what changed in transformers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import uuid4

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ManagerOutput: TypeAlias = GenerationOutput
Request: TypeAlias = RequestState
_SCHEDULER = "hotswap"


# ---- scheduler ----------------------------------------------------------------------------------


class LaneScheduler(FIFOScheduler):  # type: ignore[misc]
    """First in, first out. While `only` is a request id, that request alone is scheduled.

    transformers has no way to run one request of a batch alone, or to start a request over.
    Called from the generation thread.
    """

    only: str | None = None

    def schedule_batch(self, *budgets: int) -> Any:
        # A full cache blocks new requests until one finishes. If all active requests were
        # cancelled instead, transformers would never lift the block.
        if not self.active_requests:
            self.block_new_requests = False
        return super().schedule_batch(*budgets)

    def _process_candidates(self, candidates: list[Request], *rest: Any) -> Any:
        if self.only is not None:
            candidates = [state for state in candidates if state.request_id == self.only]
        return super()._process_candidates(candidates, *rest)

    def restart(self, request_id: str) -> None:
        """Moves an active request back to the queue. Its tokens so far join its prompt."""
        if (state := self.active_requests.get(request_id)) is not None:
            again = state.create_equivalent_initial_request()
            self.finish_request(request_id)
            self.add_waiting_request(again)

    def restart_all(self) -> None:
        """Moves all active requests back to the queue, so that the KV cache is free."""
        for request_id in list(self.active_requests):
            self.restart(request_id)

    def awaits_first_token(self, request_id: str) -> bool:
        """True until the request has a token, has failed or was cancelled."""
        if request_id in self.waiting_requests:
            return True
        state = self.active_requests.get(request_id)
        return state is not None and state.generated_len() == 0

    def add_probe(self) -> str:
        """Queues a request for one token that no caller waits for. Returns its id."""
        probe = RequestState(uuid4().hex, [0], max_new_tokens=1)
        self.add_waiting_request(probe)
        return str(probe.request_id)


def register_scheduler() -> str:
    """Lets managers find `LaneScheduler`, in a dict without a public way in. Returns its name."""
    SCHEDULER_MAPPING[_SCHEDULER] = LaneScheduler
    return _SCHEDULER


# ---- manager ------------------------------------------------------------------------------------


class SteppedManager(ContinuousBatchingManager):  # type: ignore[misc]
    """transformers' manager whose steps can be overridden: one generation thread, one KV cache.

    `config` must be for synchronous batching, with `register_scheduler()` as its scheduler type.
    `logits` replaces transformers' list of logits processors, which takes only its own kinds.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        generation_config: GenerationConfig,
        config: ContinuousBatchingConfig,
        logits: LogitsHook,
    ) -> None:
        super().__init__(
            model=model, generation_config=generation_config, continuous_batching_config=config
        )
        self.logit_processor = logits

    @property
    def scheduler(self) -> LaneScheduler:
        """The manager's scheduler. It exists while the generation thread runs."""
        scheduler = self.batch_processor.scheduler
        assert isinstance(scheduler, LaneScheduler)
        return scheduler

    @property
    def failed(self) -> bool:
        """True after an exception has ended the generation thread."""
        return self.background_thread_status.fatal_error is not None

    # In the generation thread. transformers has no hooks around a step.

    def run_step(self) -> None:
        """Runs the model once on the scheduled batch. Overridden to run code around it."""
        super()._generation_step()

    def run_iteration(self) -> bool:
        """Schedules a batch, runs it, delivers its tokens. False: the thread has to stop."""
        goes_on: bool = super()._generation_loop_body(self.batch_processor, bootstrapping=False)
        return goes_on

    def _generation_step(self) -> None:
        self.run_step()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:  # noqa: ARG002
        assert not bootstrapping, "only asynchronous batching bootstraps"
        return self.run_iteration()

    def last_batch(self, *, new_token: bool = False) -> list[Request]:
        """The requests of the last batch; `new_token`: without those that are still in prefill."""
        batch = self.batch_processor.inputs_and_outputs.requests_in_batch
        return [each.state for each in batch if each.has_new_token or not new_token]

    def fail_request(self, state: Request, error: BaseException) -> None:
        """Fails one request with `error`, where transformers only fails whole batches."""
        self.batch_processor._handle_request_error(error, state)
        self.scheduler.finish_request(state.request_id)

    def discard_output(self) -> None:
        """Drops one output of a request without a handler, as a probe is."""
        self.output_router.output_queue.get_nowait()

    # From other threads. `cancel_request` returns at once; nothing public says when it is done.

    def is_queued(self, request_id: str) -> bool:
        """True until the generation thread has picked the request up."""
        with self.input_queue.mutex:
            return any(state.request_id == request_id for state in self.input_queue.queue)

    def has_left(self, request_id: str) -> bool:
        """True when no further step can contain this cancelled request."""
        processor = self.batch_processor
        return processor is None or bool(
            self.cancel_queue.empty() and processor.scheduler.request_is_cancelled(request_id)
        )

    def remove_result_handler(self, request_id: str) -> None:
        """Forgets the handler of a cancelled request; a finished one is forgotten by itself."""
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)

    def try_empty_cache(self) -> bool:
        """Empties the prefix cache between two steps; False, and unchanged, if requests are active.

        Blocks for at most one step. Raises RuntimeError when the thread has stopped.
        """
        with self.pause():
            if self.scheduler.active_requests:
                return False
            self.batch_processor.cache.reset()
            return True


# ---- logits -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A row of the scores: the next token of one request.

    Attributes:
        kwargs: additional keyword arguments of `add_request`.
        position: in its sequence, prompt included. The same after the request has started over.
    """

    request_id: str
    kwargs: dict[str, Any]
    position: int


class LogitsHook(ContinuousBatchingLogitsProcessorList, ABC):  # type: ignore[misc]
    """Called once a step with the scores of every new token; the manager takes their argmax.

    The documented processors see neither request ids nor positions, and sample on the device.

    Shapes: B rows (padded in a CUDA graph), V tokens in the vocabulary, A arguments of a row.
    """

    def __init__(self, *, arguments: int) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.tensors_required = arguments

    @abstractmethod
    def prepare(self, rows: Sequence[NewToken], *, most: int, device: torch.device) -> torch.Tensor:
        """The arguments of these rows, float32 [A, len(rows)]. A batch has at most `most` rows."""

    @abstractmethod
    def process(self, scores_BV: torch.Tensor, args_AB: torch.Tensor) -> torch.Tensor:
        """The scores to take the argmax of. Arguments of padding rows are 0."""

    @abstractmethod
    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Raises TypeError for keyword arguments that a request cannot have."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        rows = [
            NewToken(
                request_id=request.state.request_id,
                kwargs=request.state.logit_processor_kwargs,
                position=len(request.state.initial_tokens) + request.state.generated_len(),
            )
            for request in requests_in_batch
            if request.has_new_token
        ]
        args_AB = self.prepare(rows, most=arg_storage.size(1), device=arg_storage.device)
        arg_storage.zero_()  # padding rows must not sample as an earlier batch did
        arg_storage[:, : len(rows)] = args_AB.view(torch.int32)
        return arg_storage

    def __call__(
        self,
        input_ids: torch.Tensor,  # noqa: ARG002
        scores_BV: torch.Tensor,
        logits_processor_args: torch.Tensor,
    ) -> torch.Tensor:
        args_AB = logits_processor_args[:, : scores_BV.size(0)].view(torch.float32)
        return self.process(scores_BV, args_AB)


# ---- attention ----------------------------------------------------------------------------------


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers of `model`; none if their implementation cannot be chosen by name."""
    if not model._supports_attention_backend:
        return []
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]


def set_layer_attention(layers: Sequence[nn.Module], name: str) -> None:
    """Has these layers call the attention function registered as `name`.

    The public `set_attn_implementation` would change the model as well, which chooses its masks
    and its cache by the same setting.
    """
    config: Any = copy.copy(layers[0].config)
    config._attn_implementation = name
    for layer in layers:
        layer.config = config


def attention_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The attention function that `model` itself is set to."""
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    return function


def mask_for(layer: nn.Module, mask: Any) -> Any:
    """The mask of this layer, where a model has one for each type of layer."""
    found: Any = layer
    return mask[found.config.layer_types[found.layer_idx]] if isinstance(mask, dict) else mask
