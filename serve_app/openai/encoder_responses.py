"""Builds the responses to embeddings and classification requests.

Their types are in `serve_app.openai.response_schemas`.
"""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Sequence

from serve_app.openai.requests import ClassifyRequest, EmbeddingRequest
from serve_app.openai.response_schemas import (
    Classification,
    ClassificationList,
    Embedding,
    EmbeddingList,
    InputUsage,
)


def embedding_document(
    request: EmbeddingRequest,
    vectors: Sequence[Sequence[float]],
    *,
    model: str,
    revision: str,
    replica: str,
    tokens: int,
) -> EmbeddingList:
    """One vector for each input, in their order. `tokens`: the tokens of all inputs together."""
    coded = request.encoding_format == "base64"
    data: list[Embedding] = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if coded else list(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "system_fingerprint": revision,
        "replica_id": replica,
        "usage": _input_usage(tokens),
    }


def classification_document(
    request: ClassifyRequest,
    probs: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    model: str,
    revision: str,
    replica: str,
    tokens: int,
) -> ClassificationList:
    """One row of probabilities for each input, in their order; `labels` name the columns."""
    assert len(probs) == len(request.input)
    data: list[Classification] = [
        {
            "index": index,
            "label": labels[max(range(len(row)), key=row.__getitem__)],
            "probs": list(row),
            "num_classes": len(row),
        }
        for index, row in enumerate(probs)
    ]
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": revision,
        "replica_id": replica,
        "data": data,
        "usage": _input_usage(tokens),
    }


def _input_usage(tokens: int) -> InputUsage:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
