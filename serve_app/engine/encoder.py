"""Embeddings and classification: one forward pass for a batch, one row of numbers for each text.

Shapes: B texts, L tokens of the longest, D features, C classes. Texts are padded at their end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.compiler.config
from torch import nn

from hotswap_lib import Revision, Slot
from serve_app.engine.batching import BatchEngine, Job
from serve_app.engine.compile import compile_layers
from serve_app.engine.engine import Ticket
from serve_app.engine.pooling import Pooling, pool
from serve_app.settings import Settings

_STEP = 8  # batches are padded to multiples of it: a length of 1 would be a graph of its own
_GRAPHS = (
    32  # layers of several kinds share one forward, and so one limit: T5's first, and the rest
)


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
        """`pooling`: how embeddings are made of the tokens' vectors; None: the model classifies."""
        super().__init__(slot, settings)
        self._model: Any = slot.model.get_base_model()
        self._pooling = pooling
        config = self._model.config.get_text_config()
        config.use_cache = False  # a text is one forward pass
        self._pad = getattr(config, "pad_token_id", None) or 0
        self.vocabulary = int(config.vocab_size)
        self.max_tokens = min(settings.max_model_len, _positions(self._model))
        # Whole layers: without a cache none depends on its number. On a BERT as fast as compiling
        # the whole model (0.3 of eager's time; regions: 0.6). The time to compile does not grow
        # with depth, and with dynamic sizes a few graphs serve every shape.
        if settings.compile:
            self.compiled_regions = compile_layers(self._model)

    async def run(self, ticket: Ticket, ids: list[int]) -> list[float]:
        """The embedding of one text [D], or its classes [C]: probabilities or regression values.

        Raises `GenerationFailed` or `EngineStopped`.
        """
        row: list[float] = await self._result(ticket, Text(ticket.revision, ids))
        return row

    def _run(self, jobs: Sequence[Text]) -> list[list[float]]:
        return self._rows([job.ids for job in jobs])

    def _run_every_shape(self) -> None:
        # alone and with others: dynamo treats a size of 1 as a special case; with padding and
        # without: transformers omits the mask where it can
        full, half = [self._pad] * min(5 * _STEP, self.max_tokens), [self._pad]
        together = [full] * min(3, self.settings.max_batch_size)
        for texts in ([full], [half], together, [*together[:-1], half]):
            self._rows(texts)
        if self._model.device.type == "cuda":  # fails now if the largest batch does not fit
            self._rows([[self._pad] * self.max_tokens] * self.settings.max_batch_size)

    def _rows(self, texts: Sequence[list[int]]) -> list[list[float]]:
        ids_BL, mask_BL = self._padded(texts)
        with _graphs_allowed():
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


def _graphs_allowed() -> AbstractContextManager[None]:
    """Lets dynamo keep `_GRAPHS` graphs of a function that it compiles inside, in this thread."""
    config: Any = torch.compiler.config
    allowed: AbstractContextManager[None] = config.patch(
        recompile_limit=max(config.recompile_limit, _GRAPHS)
    )
    return allowed


def _classes(logits_BC: torch.Tensor, config: Any) -> torch.Tensor:
    """Classes from logits, by the rule of transformers' TextClassificationPipeline."""
    if config.problem_type == "regression":
        return logits_BC
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits_BC.sigmoid()
    return logits_BC.softmax(-1)


def _positions(model: Any) -> int:
    """The number of tokens for which the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        # RoBERTa's first position is the one after the padding's own
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return int(limit - module.padding_idx - 1)
    return int(limit)
