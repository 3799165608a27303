"""Embeddings and classification: one forward pass for a batch, one row of numbers for each text.

Shapes: B texts, L tokens of the longest, padded at its end; D features, C classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo.config
from torch import nn

from hotswap_lib import Revision, Slot
from serve_app.engine.batching import BatchEngine, Job
from serve_app.engine.compile import compile_layers
from serve_app.engine.engine import Ticket
from serve_app.engine.pooling import Pooling, pool
from serve_app.settings import Settings

_STEP = 8  # lengths are multiples of it: a length of 1 would be a graph of its own
_GRAPHS = 32


class Text(Job):
    """The token ids of one text."""

    def __init__(self, revision: Revision, ids: list[int]) -> None:
        super().__init__(revision)
        self.ids = ids


class EncoderEngine(BatchEngine[Text]):
    """Rows of one prepared model.

    Attributes:
        max_tokens: the longest text, in tokens.
    """

    def __init__(self, slot: Slot, settings: Settings, *, pooling: Pooling | None) -> None:
        """`pooling`: how embeddings are made of tokens; None: the model classifies."""
        super().__init__(slot, settings)
        self._model: Any = slot.model.base_model.model
        self._pooling = pooling
        config = self._model.config.get_text_config()
        config.use_cache = False  # no text is continued
        self._pad = getattr(config, "pad_token_id", None) or 0
        self.vocabulary = int(config.vocab_size)
        self.max_tokens = min(settings.max_model_len, _positions(self._model))
        # whole layers, since nothing here knows its number without a cache: on a BERT as fast as
        # the whole model compiled (0.3 of eager's time; regions: 0.6), in a time that depth does
        # not change, and with dynamic sizes a few graphs serve every shape
        if settings.compile:
            # layers of several kinds share one forward, and so one limit: T5's first, and the rest
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, _GRAPHS)
            self.compiled_regions = compile_layers(self._model)

    async def run(self, ticket: Ticket, ids: list[int]) -> list[float]:
        """One text's embedding [D], or its classes [C]: probabilities, or a regression's values.

        Raises `GenerationFailed` or `EngineStopped`.
        """
        row: list[float] = await self._result(ticket, Text(ticket.revision, ids))
        return row

    def _run(self, jobs: Sequence[Text]) -> list[list[float]]:
        return self._rows([job.ids for job in jobs])

    def _run_every_shape(self) -> None:
        # alone and with others, since dynamo treats a size of 1 apart; padded and not, since
        # transformers leaves the mask out where it can
        full, half = [self._pad] * min(5 * _STEP, self.max_tokens), [self._pad]
        together = [full] * min(3, self.settings.max_batch_size)
        for texts in ([full], [half], together, [*together[:-1], half]):
            self._rows(texts)
        if self._model.device.type == "cuda":  # one that cannot hold the largest batch says so now
            self._rows([[self._pad] * self.max_tokens] * self.settings.max_batch_size)

    def _rows(self, texts: Sequence[list[int]]) -> list[list[float]]:
        ids_BL, mask_BL = self._padded(texts)
        output = self._model(input_ids=ids_BL, attention_mask=mask_BL, return_dict=True)
        if self._pooling is None:
            rows = _classes(output.logits.float(), self._model.config)
        else:
            rows = pool(output.last_hidden_state, mask_BL, self._pooling)
            if self.settings.normalize:
                rows = nn.functional.normalize(rows, dim=-1)
        listed: list[list[float]] = rows.tolist()
        return listed

    def _padded(self, texts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, texts))
        length = min(-(-longest // _STEP) * _STEP, max(longest, self.max_tokens))
        ids_BL = torch.full((len(texts), length), self._pad)
        mask_BL = torch.zeros_like(ids_BL)
        for row, ids in enumerate(texts):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            mask_BL[row, : len(ids)] = 1
        return ids_BL.to(self._model.device), mask_BL.to(self._model.device)


def _classes(logits_BC: torch.Tensor, config: Any) -> torch.Tensor:
    """What the logits mean, by the rule of transformers' TextClassificationPipeline."""
    if config.problem_type == "regression":
        return logits_BC
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits_BC.sigmoid()
    return logits_BC.softmax(-1)


def _positions(model: Any) -> int:
    """How many tokens the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        # RoBERTa counts from behind the padding's own position
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return int(limit - module.padding_idx - 1)
    return int(limit)
