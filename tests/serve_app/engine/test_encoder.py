"""Embeddings and classes: those of plain PEFT models, in any batch, and nothing recompiles."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from hotswap_lib import CompileGuard
from serve_app.engine.encoder import EncoderEngine
from serve_app.engine.pooling import Pooling, pool
from tests.serve_app.batching import Models, Running, running, texts
from tests.serve_app.encoders import (
    BERT,
    NEAR,
    VOCABULARY,
    bert_classifier,
    bert_encoder,
    made,
    plain_vectors,
)

LENGTHS = (1, 2, 5, 8, 9, 16, 17, 31, 40, 64, 3, 7)
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_labels": 3,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def classifier(folder: Any) -> Models:
    return bert_classifier(folder)


@pytest.fixture(scope="module")
def encoder(folder: Any) -> Models:
    return bert_encoder(folder)


@pytest.fixture(scope="module")
def classes(classifier: Models) -> Iterator[Running[EncoderEngine]]:
    with running(made(classifier), classifier) as started:
        yield started


@pytest.fixture(scope="module")
def vectors(encoder: Models) -> Iterator[Running[EncoderEngine]]:
    with running(made(encoder, "mean"), encoder) as started:
        yield started


async def rows(
    engine: EncoderEngine, inputs: list[list[int]], pin: str | None = None
) -> tuple[str, torch.Tensor]:
    """The revision's name and a row for each text; all at once."""
    async with engine.admit(pin) as ticket:
        listed = await asyncio.gather(*(engine.run(ticket, ids) for ids in inputs))
        return ticket.revision.name, torch.tensor(listed)


def plain_classes(models: Models, name: str, inputs: list[list[int]]) -> torch.Tensor:
    model = models.plain(name)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits.softmax(-1) for ids in inputs])


# ---- exact answers ------------------------------------------------------------------------------


def test_probabilities_are_those_of_a_plain_peft_model_with_the_same_head(
    classes: Running[EncoderEngine], classifier: Models
) -> None:
    inputs = texts(VOCABULARY, *LENGTHS)
    for name in ("red", "blue", "red"):
        classes(classes.swap(name))
        said, found = classes(rows(classes.engine, inputs))
        assert said == name
        torch.testing.assert_close(found, plain_classes(classifier, name, inputs), **NEAR)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings_are_those_of_a_plain_peft_model(encoder: Models, pooling: Pooling) -> None:
    inputs = texts(VOCABULARY, *LENGTHS)
    with running(made(encoder, pooling), encoder) as started:
        started(started.swap("blue"))
        _, found = started(rows(started.engine, inputs))
    expected = plain_vectors(encoder, "blue", inputs, pooling)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_have_length_one_unless_the_settings_say_otherwise(
    encoder: Models, normalize: bool
) -> None:
    with running(made(encoder, "mean", normalize=normalize), encoder) as started:
        _, found = started(rows(started.engine, texts(VOCABULARY, 5)))
    assert (abs(float(found.norm()) - 1) < 1e-5) is normalize


def test_the_rest_of_a_batch_does_not_change_the_row_of_a_text(
    vectors: Running[EncoderEngine],
) -> None:
    inputs = texts(VOCABULARY, 3, 64, 9, 40)
    _, together = vectors(rows(vectors.engine, inputs))
    alone = torch.cat([vectors(rows(vectors.engine, [ids]))[1] for ids in inputs])
    torch.testing.assert_close(together, alone, **NEAR)


def test_decoders_classify_by_their_last_token_and_embed_by_it(folder: Any) -> None:
    inputs = texts(VOCABULARY, *LENGTHS)
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**LLAMA))
    models = Models(base, folder / "llama-classes", saved=("score",), task_type="SEQ_CLS")
    with running(made(models), models) as started:
        started(started.swap("red"))
        _, found = started(rows(started.engine, inputs))
    expected = plain_classes(models, "red", inputs)
    torch.testing.assert_close(found, expected, **NEAR)

    models = Models(LlamaModel(LlamaConfig(**LLAMA)), folder / "llama")
    with running(made(models, "last"), models) as started:
        started(started.swap("red"))
        _, found = started(rows(started.engine, inputs))
    expected = plain_vectors(models, "red", inputs, "last")
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [
        ("multi_label_classification", 3, torch.sigmoid),
        ("regression", 3, lambda logits: logits),
        (None, 1, torch.sigmoid),
        (None, 3, lambda logits: logits.softmax(-1)),
    ],
)
def test_logits_become_what_the_problem_is(
    folder: Any, problem: str | None, labels: int, expected: Any
) -> None:
    config = BertConfig(**{**BERT, "num_labels": labels, "problem_type": problem})
    models = Models(BertForSequenceClassification(config), folder / f"{problem}-{labels}")
    [ids] = inputs = texts(VOCABULARY, 6)
    with running(made(models), models) as started:
        _, found = started(rows(started.engine, inputs))
    with torch.no_grad():
        logits = models.plain("base")(torch.tensor([ids])).logits
    torch.testing.assert_close(found, expected(logits), **NEAR)


def test_pooling_sees_no_padding() -> None:
    hidden_BLD = torch.arange(12.0).view(2, 3, 2)
    mask_BL = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden_BLD, mask_BL, "mean").tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert pool(hidden_BLD, mask_BL, "last").tolist() == [[2.0, 3.0], [10.0, 11.0]]
    assert pool(hidden_BLD, mask_BL, "cls").tolist() == [[0.0, 1.0], [6.0, 7.0]]


# ---- revisions under load -----------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", ["overlap", "drain"])
def test_interleaved_revisions_under_load_are_each_exact(encoder: Models, in_flight: Any) -> None:
    inputs = texts(VOCABULARY, 4, 12, 33)
    expected = {
        name: plain_vectors(encoder, name, inputs, "mean") for name in ("base", "red", "blue")
    }
    with running(made(encoder, "mean"), encoder) as started:
        engine = started.engine
        seen: set[str] = set()

        async def ask(pin: str | None) -> None:
            while len(seen) < 3:
                name, found = await rows(engine, inputs, pin)
                assert pin in (None, name)
                seen.add(name)
                torch.testing.assert_close(found, expected[name], **NEAR)

        async def story() -> None:
            await engine.add(started.staged("blue"))
            asking = [asyncio.create_task(ask(pin)) for pin in (None, "blue", None)]
            await asyncio.sleep(0)
            await engine.cut_over(started.staged("red"), in_flight=in_flight)
            await asyncio.gather(*asking)

        started(story())
        assert engine.weight_lock.commits > 0


# ---- compiled -----------------------------------------------------------------------------------


def test_nothing_compiles_after_warm_up_whatever_shapes_and_revisions_come(
    encoder: Models,
) -> None:
    inputs = texts(VOCABULARY, *LENGTHS)
    with running(made(encoder, "mean", compile=True), encoder) as started:
        engine = started.engine
        assert engine.compiled_regions == 2

        async def story() -> None:
            await engine.warm_up()
            for name in ("red", "blue"):
                await started.swap(name)
                for some in (
                    inputs,
                    inputs[:1],
                    inputs[1:3],
                    [[5] * 16] * 8,
                    [[5] * 8],
                    inputs[3:8],
                ):
                    _, found = await rows(engine, some)
                    expected = plain_vectors(encoder, name, some, "mean")
                    torch.testing.assert_close(found, expected, **NEAR)

        started(story())
        assert (engine.guard.recompiles, engine.guard.limit_hits) == (0, 0)


def test_an_engine_that_compiles_leaves_the_recompile_limit_of_the_process_alone(
    encoder: Models,
) -> None:
    before = torch.compiler.config.recompile_limit
    made(encoder, "mean", compile=True)
    assert torch.compiler.config.recompile_limit == before


def test_an_encoder_of_several_kinds_of_layers_compiles_completely(folder: Any) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
    models = Models(T5EncoderModel(config), folder / "t5")
    inputs = texts(VOCABULARY, *LENGTHS)
    # graphs are captured but not lowered, which would take a minute
    stance = torch.compiler.set_stance("default", force_backend="eager")
    whole = CompileGuard()
    with stance, running(made(models, "mean", compile=True), models) as started:
        engine = started.engine

        async def story() -> torch.Tensor:
            await engine.warm_up()
            assert whole.limit_hits == 0, "a layer ran eager, since dynamo has too many graphs"
            await started.swap("red")
            return (await rows(engine, inputs))[1]

        found = started(story())
        assert (engine.guard.recompiles, engine.guard.limit_hits) == (0, 0)
    expected = plain_vectors(models, "red", inputs, "mean")
    torch.testing.assert_close(found, expected, **NEAR)
