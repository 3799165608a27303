"""Embedding and classification requests: documents in order, refusals, one failure for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from serve_app.engine.encoder import EncoderEngine
from serve_app.openai.requests import ClassifyRequest, EmbeddingRequest
from serve_app.replica.serving_encode import EncoderServing
from serve_app.settings import Settings
from serve_app.wire.errors import GenerationFailed, InvalidRequest
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.batching import Models, Running, running
from tests.serve_app.encoders import (
    NEAR,
    VOCABULARY,
    bert_classifier,
    bert_encoder,
    made,
    plain_vectors,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Models:
    return bert_encoder(folder)


@pytest.fixture(scope="module")
def classes(folder: Path) -> Iterator[Running[EncoderEngine]]:
    models = bert_classifier(folder)
    with running(made(models), models) as started:
        yield started


@pytest.fixture(scope="module")
def vectors(encoder: Models) -> Iterator[Running[EncoderEngine]]:
    with running(made(encoder, "mean"), encoder) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(world: TinyWorld) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(world.model)


def answers(engine: EncoderEngine, tokenizer: Any, **more: Any) -> EncoderServing:
    settings = Settings(served_model_name="tiny")
    return EncoderServing(engine, tokenizer, settings, replica="r1", **more)


def test_embeddings_of_texts_and_token_lists_come_in_their_order(
    vectors: Running[EncoderEngine], encoder: Models, tokenizer: Any
) -> None:
    vectors(vectors.swap("red"))
    ids = tokenizer("hello")["input_ids"]
    request = EmbeddingRequest(input=["hello", "a much longer text"])
    document = vectors(answers(vectors.engine, tokenizer).embeddings(request))
    same = vectors(answers(vectors.engine, tokenizer).embeddings(EmbeddingRequest(input=[ids])))
    found = torch.tensor([each["embedding"] for each in document["data"]])
    expected = plain_vectors(encoder, "red", [ids], "mean")
    torch.testing.assert_close(found[:1], expected, **NEAR)
    torch.testing.assert_close(torch.tensor([same["data"][0]["embedding"]]), expected, **NEAR)
    assert document["system_fingerprint"] == str(vectors.engine.default)
    assert document["usage"]["prompt_tokens"] == len("hello") + len("a much longer text")
    assert document["model"] == "tiny"


def test_classes_have_the_labels_of_the_model(
    classes: Running[EncoderEngine], tokenizer: Any
) -> None:
    ask = answers(classes.engine, tokenizer, labels=("no", "maybe", "yes"))
    document = classes(ask.classify(ClassifyRequest(input=["hello", "you"])))
    for index, each in enumerate(document["data"]):
        assert each["index"] == index
        assert each["label"] == ("no", "maybe", "yes")[each["probs"].index(max(each["probs"]))]
        assert sum(each["probs"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"input": "x" * 65}, "context_length_exceeded"),
        ({"input": "x" * 100_000}, "context_length_exceeded"),
        ({"input": [[1] * 65]}, "context_length_exceeded"),
        ({"input": [[VOCABULARY]]}, "invalid_parameter"),
    ],
)
def test_what_the_model_cannot_read_is_refused_before_it_is_asked(
    vectors: Running[EncoderEngine], tokenizer: Any, request_: dict[str, Any], code: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        vectors(
            answers(vectors.engine, tokenizer).embeddings(EmbeddingRequest.model_validate(request_))
        )
    assert (refused.value.status, refused.value.code) == (400, code)
    assert vectors.engine.admission.running == 0


def test_one_text_that_fails_ends_the_request_and_nothing_keeps_running(
    vectors: Running[EncoderEngine], tokenizer: Any
) -> None:
    engine = vectors.engine
    request = EmbeddingRequest(input=[[1, 2], [VOCABULARY + 1]])
    real, engine.vocabulary = engine.vocabulary, 10**6
    try:
        with pytest.raises(GenerationFailed):
            vectors(answers(engine, tokenizer).embeddings(request))
    finally:
        engine.vocabulary = real
    assert engine.admission.running == 0
