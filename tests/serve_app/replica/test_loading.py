"""From a folder to a prepared model, or one sentence about why not."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from hotswap_lib import BASE, pack
from serve_app.replica.loading import UnsupportedModel, check, load
from serve_app.replica.model_task import task_of
from serve_app.settings import Settings
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.batching import Models

BERT: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
T5: dict[str, Any] = {
    "vocab_size": 260,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def saved(model: PreTrainedModel, folder: Path, world: TinyWorld) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.model).save_pretrained(folder)
    return folder


def settings(model: Path, **more: Any) -> Settings:
    return Settings.model_validate({"model": str(model), **more})


def refusal(wanted: Settings) -> str:
    """The sentence of `check`, before anything was started, which is also that of `load`."""
    said = set()
    for ask in (check, load):
        with pytest.raises(UnsupportedModel) as refused:
            ask(wanted)
        said.add(str(refused.value))
    [sentence] = said
    assert "\n" not in sentence
    assert sentence.startswith(f"the model {wanted.model} cannot be served: ")
    return sentence.partition(": ")[2]


# ---- causal models ------------------------------------------------------------------------------


def test_a_causal_language_model_comes_with_its_slot_its_tokenizer_and_its_end(
    world: TinyWorld,
) -> None:
    loaded = load(settings(world.model, max_rank=8))
    assert loaded.task == "causal"
    assert loaded.slot.revision == BASE
    assert loaded.slot.envelope.max_rank == 8
    assert loaded.eos_token_ids == [259]
    assert loaded.tokenizer("ab")["input_ids"] == loaded.tokenizer("ab")["input_ids"]
    assert loaded.tokenizer.chat_template


def test_target_modules_are_names_between_commas(world: TinyWorld) -> None:
    loaded = load(settings(world.model, target_modules="q_proj, v_proj"))
    modules = {entry.module.rsplit(".", 1)[-1] for entry in loaded.slot.layout.entries}
    assert modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_model_is_loaded_in_the_dtype_of_the_settings(
    world: TinyWorld, dtype: str
) -> None:
    loaded = load(settings(world.model, dtype=dtype))
    assert str(loaded.slot.model.get_input_embeddings().weight.dtype) == f"torch.{dtype}"


def test_several_end_tokens_are_all_known(world: TinyWorld, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [3, 259]
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert load(settings(folder)).eos_token_ids == [3, 259]


# ---- the other tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "wanted", "task"),
    [
        ("LlamaForCausalLM", LlamaConfig(), "auto", "causal"),
        (None, LlamaConfig(), "auto", "causal"),
        ("LlamaModel", LlamaConfig(), "auto", "embed"),
        ("LlamaForCausalLM", LlamaConfig(), "embed", "embed"),
        ("LlamaForSequenceClassification", LlamaConfig(), "auto", "classify"),
        ("BertForMaskedLM", BertConfig(), "auto", "embed"),
        ("BertModel", BertConfig(), "auto", "embed"),
        (None, BertConfig(), "auto", "embed"),
        ("BertLMHeadModel", BertConfig(is_decoder=True), "auto", "causal"),
        ("BertForSequenceClassification", BertConfig(), "auto", "classify"),
        ("T5ForConditionalGeneration", T5Config(), "auto", "seq2seq"),
        ("T5ForConditionalGeneration", T5Config(), "generate", "seq2seq"),
        (None, T5Config(), "auto", "seq2seq"),
        ("BartModel", T5Config(), "auto", "seq2seq"),
        ("T5EncoderModel", T5Config(), "auto", "embed"),
    ],
)
def test_the_task_is_what_the_checkpoint_was_saved_for_unless_settings_say_more(
    name: str | None, config: Any, wanted: str, task: str
) -> None:
    config.architectures = [name] if name else None
    assert task_of(config, Settings.model_validate({"task": wanted})) == task


def test_a_text_to_text_model_knows_where_its_answers_end(world: TinyWorld, tmp_path: Path) -> None:
    model = T5ForConditionalGeneration(T5Config(**T5))
    loaded = load(settings(saved(model, tmp_path, world)))
    assert loaded.task == "seq2seq"
    assert loaded.eos_token_ids == [1, 259]


def test_an_encoder_is_loaded_without_the_head_of_its_pretraining(
    world: TinyWorld, tmp_path: Path
) -> None:
    loaded = load(settings(saved(BertForMaskedLM(BertConfig(**BERT)), tmp_path, world)))
    assert (loaded.task, loaded.pooling, loaded.labels) == ("embed", "mean", ())
    assert type(loaded.slot.model.base_model.model) is BertModel


def test_half_of_a_text_to_text_model_embeds(world: TinyWorld, tmp_path: Path) -> None:
    loaded = load(settings(saved(T5EncoderModel(T5Config(**T5)), tmp_path, world)))
    assert (loaded.task, loaded.pooling) == ("embed", "mean")
    assert type(loaded.slot.model.base_model.model) is T5EncoderModel


def test_a_classifier_comes_with_its_labels(world: TinyWorld, tmp_path: Path) -> None:
    config = BertConfig(**BERT, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    loaded = load(settings(saved(BertForSequenceClassification(config), tmp_path, world)))
    assert (loaded.task, loaded.labels, loaded.pooling) == ("classify", ("no", "yes"), None)


# ---- pooling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "pooling"),
    [
        (None, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_is_what_the_models_own_files_say_and_for_decoders_else_the_last_token(
    world: TinyWorld, tmp_path: Path, own: Any, pooling: str
) -> None:
    folder = saved(LlamaModel(LlamaConfig(**LLAMA)), tmp_path, world)
    if own is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(own))
    assert load(settings(folder)).pooling == pooling
    assert load(settings(folder, pooling="mean")).pooling == "mean"


def test_pooling_that_is_not_available_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    folder = saved(BertModel(BertConfig(**BERT)), tmp_path, world)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    said = "its pooling is max_tokens; set pooling to mean, cls or last"
    assert refusal(settings(folder)) == said
    layers = [{"type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(layers))
    assert "a layer outside of the transformers model" in refusal(settings(folder, pooling="cls"))


# ---- heads that adapters bring ------------------------------------------------------------------


def test_a_classifier_without_a_head_is_refused_unless_adapters_bring_it(
    world: TinyWorld, tmp_path: Path
) -> None:
    folder = saved(BertModel(BertConfig(**BERT)), tmp_path, world)
    assert refusal(settings(folder, task="classify")) == (
        "its checkpoint has no weights for classifier; if every adapter brings them, "
        "set modules_to_save=classifier"
    )
    loaded = load(settings(folder, task="classify", modules_to_save="classifier,score"))
    with torch.no_grad():  # no adapter has brought one yet: equal logits
        logits = loaded.slot.model(input_ids=torch.tensor([[5, 6]])).logits
    assert logits.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("has_head", [False, True])
def test_a_head_has_as_many_labels_as_the_first_adapter_has(
    world: TinyWorld, tmp_path: Path, has_head: bool
) -> None:
    torch.manual_seed(0)
    config = BertConfig(**BERT, num_labels=5)
    trained = BertForSequenceClassification(config)
    models = Models(trained, tmp_path / "adapters", ("classifier",), task_type="SEQ_CLS")
    base: Any = trained.bert
    if has_head:
        base = BertForSequenceClassification(BertConfig(**BERT, num_labels=2))
        base.bert.load_state_dict(trained.bert.state_dict())
    loaded = load(
        settings(
            saved(base, tmp_path / "base", world),
            task="classify",
            modules_to_save="classifier",
            adapter=str(models.paths["red"]),
        )
    )
    assert loaded.labels == tuple(f"LABEL_{i}" for i in range(5))
    loaded.slot.commit(loaded.slot.stage(pack(str(models.paths["red"]), loaded.slot.layout)))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found = loaded.slot.model(input_ids=ids).logits
        expected = models.plain("red")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_that_lacks_weights_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    folder = saved(LlamaModel(LlamaConfig(**LLAMA)), tmp_path, world)
    with pytest.raises(UnsupportedModel, match="no weights for lm_head"):
        load(settings(folder, task="generate"))


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wanted", "said"),
    [
        ({"model_type": "bert"}, "generate", "bert is not a causal language model"),
        ({"model_type": "vit"}, "auto", "vit is not a causal language model"),
        ({"model_type": "vit"}, "embed", "vit reads image, and a request has only text"),
        ({"model_type": "clip"}, "embed", "clip reads image and text, and a request has only text"),
        ({"model_type": "whisper"}, "auto", "whisper is not a text-to-text model"),
        ({"model_type": "wav2vec2"}, "classify", "wav2vec2 is not a model for text classification"),
        (
            {"model_type": "bert", "architectures": ["BertForTokenClassification"]},
            "auto",
            "BertForTokenClassification is neither for generation nor embeddings nor text "
            "classification; set task to use it for one of them",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "embed",
            "t5 has an encoder and a decoder, and embeddings need an encoder alone",
        ),
        (
            {"model_type": "bart", "architectures": ["BartForSequenceClassification"]},
            "auto",
            "bart classifies by the end token of a text, and requests need not have one",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_before_its_weights_are_read(
    tmp_path: Path, config: dict[str, Any], wanted: str, said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(settings(tmp_path, task=wanted)) == said


@pytest.mark.parametrize("content", [None, "{", json.dumps({"model_type": "no-such-thing"})])
def test_a_folder_without_a_model_in_it_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert refusal(settings(tmp_path))


def test_a_refusal_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(UnsupportedModel("m", "no")))
    assert (error.model, error.why, error.code) == ("m", "no", "unsupported_model")
