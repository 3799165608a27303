"""Encoders for the tests: tiny BERTs with two adapters, and the vectors of plain PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from serve_app.engine.encoder import EncoderEngine
from serve_app.engine.pooling import Pooling
from serve_app.settings import Settings
from tests.serve_app.batching import Models

VOCABULARY = 300
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_labels": 3,
}


def bert_classifier(folder: Path) -> Models:
    base = BertForSequenceClassification(BertConfig(**BERT))
    return Models(base, folder / "bert-classes", saved=("classifier",), task_type="SEQ_CLS")


def bert_encoder(folder: Path) -> Models:
    return Models(BertModel(BertConfig(**BERT)), folder / "bert")


def made(models: Models, pooling: Pooling | None = None, **settings: Any) -> EncoderEngine:
    given = {"compile": False, "max_batch_size": 8, "batch_wait_s": 0.001}
    return EncoderEngine(models.slot(), Settings.model_validate(given | settings), pooling=pooling)


def plain_vectors(
    models: Models, name: str, inputs: list[list[int]], pooling: Pooling
) -> torch.Tensor:
    model = models.plain(name)
    found = []
    with torch.no_grad():
        for ids in inputs:
            [hidden_LD] = model(torch.tensor([ids])).last_hidden_state
            by = {"mean": hidden_LD.mean(0), "cls": hidden_LD[0], "last": hidden_LD[-1]}
            found.append(by[pooling])
    return torch.nn.functional.normalize(torch.stack(found), dim=-1)
