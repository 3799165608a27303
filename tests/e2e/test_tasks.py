"""Every task over real Serve: embeddings, classes whose head swaps too, text to text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from serve_app.rollout.plan import Plan
from tests.serve_app.batching import Models

from .conftest import Cluster, deployed
from .fleet import Fleet
from .tiny_world import TinyWorld, tiny_tokenizer

BERT: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 259,
}
TEXTS = ["short", "a text that is somewhat longer", "x"]


def saved(model: PreTrainedModel, folder: Path, *heads: str, **more: Any) -> Models:
    """The base model with a tokenizer, and two adapters for it."""
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return Models(model, folder, saved=heads, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return tmp_path_factory.mktemp("tasks")


def application(
    cluster: Cluster, world: TinyWorld, models: Models, app: str, **settings: Any
) -> Iterator[Fleet]:
    base = models.paths["red"].parent / "base"
    given: dict[str, Any] = {
        "model": str(base),
        "adapter": str(models.paths["red"]),
        "max_model_len": 64,
        "replicas": 1,
        "lanes": 1,
    }
    with deployed(cluster, world, app=app, **(given | settings)) as fleet:
        yield fleet


def client(fleet: Fleet) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0)


def ids(text: str) -> list[int]:
    found: list[int] = tiny_tokenizer()(text)["input_ids"]
    return found


def roll(fleet: Fleet, path: Path) -> None:
    ended = fleet.client.wait(fleet.client.start(Plan(adapter=str(path))).id, timeout_s=60)
    assert ended.state == "succeeded", ended


@torch.no_grad()
def test_embeddings_are_those_of_the_live_adapter(
    cluster: Cluster, world: TinyWorld, folder: Path
) -> None:
    models = saved(BertModel(BertConfig(**BERT)), folder / "embed")
    for fleet in application(cluster, world, models, "embed"):
        with client(fleet) as speaker:
            for name in ("red", "blue"):
                roll(fleet, models.paths[name])
                found = speaker.embeddings.create(model="tiny", input=TEXTS)  # as base64
                plain = models.plain(name)
                for text, row in zip(TEXTS, found.data, strict=True):
                    hidden = plain(torch.tensor([ids(text)])).last_hidden_state.mean(1)
                    want = torch.nn.functional.normalize(hidden)[0]
                    torch.testing.assert_close(torch.tensor(row.embedding), want, atol=1e-5, rtol=0)
                assert found.usage.prompt_tokens == sum(len(ids(text)) for text in TEXTS)
            with pytest.raises(openai.BadRequestError, match="answers on /v1/embeddings"):
                speaker.completions.create(model="tiny", prompt="x")


@pytest.mark.slow
@torch.no_grad()
def test_a_classifier_swaps_its_head_with_the_adapter(
    cluster: Cluster, world: TinyWorld, folder: Path
) -> None:
    base = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    models = saved(base, folder / "classify", "classifier", task_type="SEQ_CLS")
    settings = {"modules_to_save": "classifier"}
    for fleet in application(cluster, world, models, "classify", **settings):
        for name in ("red", "blue"):
            roll(fleet, models.paths[name])
            found = httpx.post(f"{fleet.url}/v1/classify", json={"input": TEXTS}, timeout=60).json()
            assert found["system_fingerprint"].startswith(f"{name}@")
            plain = models.plain(name)
            for text, row in zip(TEXTS, found["data"], strict=True):
                want = plain(torch.tensor([ids(text)])).logits.softmax(-1)[0]
                torch.testing.assert_close(torch.tensor(row["probs"]), want, atol=1e-5, rtol=0)
                assert row["num_classes"] == 3


@pytest.mark.slow
def test_a_text_to_text_model_answers_completions_whole_and_streamed(
    cluster: Cluster, world: TinyWorld, folder: Path
) -> None:
    config = T5Config(
        vocab_size=260,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=259,
        initializer_factor=3.0,
    )
    models = saved(T5ForConditionalGeneration(config), folder / "t5", task_type="SEQ_2_SEQ_LM")
    for fleet in application(cluster, world, models, "t5"):
        with client(fleet) as speaker:
            for name in ("red", "blue"):
                roll(fleet, models.paths[name])
                ask: dict[str, Any] = {"model": "tiny", "prompt": TEXTS[1], "max_tokens": 8}
                whole = speaker.completions.create(
                    **ask, temperature=0, extra_body={"return_token_ids": True}
                )
                plain = models.plain(name).generate(
                    input_ids=torch.tensor([ids(TEXTS[1])]), do_sample=False, max_new_tokens=8
                )
                assert whole.choices[0].model_extra is not None
                assert whole.choices[0].model_extra["token_ids"] == plain[0, 1:].tolist()
                chunks = speaker.completions.create(**ask, temperature=0, stream=True)
                text = "".join(chunk.choices[0].text for chunk in chunks)
                assert text == whole.choices[0].text
