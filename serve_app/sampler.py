"""Per-request sampling for continuous batching.

transformers' own per-request processors sort the whole vocabulary for every row, also for greedy
ones. This one leaves greedy rows alone and adds Gumbel noise to the others, so that the engine's
`argmax` draws exactly from softmax(logits / temperature): argmax(x + Gumbel) ~ softmax(x)
(Gumbel-max; Maddison et al., A* Sampling, 2014).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)


class Temperature(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """`temperature` per request; 0 is greedy. scores_BV: one row for each new token."""

    supported_kwargs: ClassVar[dict[str, type]] = {"temperature": float}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()  # the bits of 0.0: greedy

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        values = [
            request.state.logit_processor_kwargs.get("temperature", 0.0)
            for request in requests_with_new_token
        ]
        # all arguments travel in one int32 buffer: same bits, another name
        return torch.tensor(values, dtype=torch.float32).view(dtype=torch.int32)

    def __call__(self, scores_BV: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        temperature_B1 = tensor_arg[: scores_BV.size(0)].view(dtype=torch.float32).unsqueeze(-1)
        # on the host the question costs nothing; on a GPU it would be a sync, and break a graph
        if scores_BV.device.type == "cpu" and not bool((temperature_B1 > 0).any()):
            return scores_BV
        gumbel_BV = -torch.empty_like(scores_BV).exponential_().log()
        sampled_BV = scores_BV / temperature_B1.clamp(min=1e-4) + gumbel_BV
        return torch.where(temperature_B1 > 0, sampled_BV, scores_BV)
