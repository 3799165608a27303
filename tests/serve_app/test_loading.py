"""From a folder to a prepared model, or one sentence about why not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from transformers import BertConfig

from hotswap_lib import BASE
from serve_app.loading import UnsupportedModel, check, load
from serve_app.settings import Settings
from tests.e2e.tiny_world import TinyWorld


def test_a_causal_language_model_comes_with_its_slot_its_tokenizer_and_its_end(
    world: TinyWorld,
) -> None:
    loaded = load(Settings(model=str(world.model), max_rank=8))
    assert loaded.slot.revision == BASE
    assert loaded.slot.envelope.max_rank == 8
    assert loaded.eos_token_ids == [259]
    assert loaded.tokenizer("ab")["input_ids"] == loaded.tokenizer("ab")["input_ids"]
    assert loaded.tokenizer.chat_template


def test_target_modules_are_names_between_commas(world: TinyWorld) -> None:
    loaded = load(Settings(model=str(world.model), target_modules="q_proj, v_proj"))
    modules = {entry.module.rsplit(".", 1)[-1] for entry in loaded.slot.layout.entries}
    assert modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_model_is_loaded_in_the_dtype_of_the_settings(
    world: TinyWorld, dtype: str
) -> None:
    loaded = load(Settings.model_validate({"model": str(world.model), "dtype": dtype}))
    assert str(loaded.slot.model.get_input_embeddings().weight.dtype) == f"torch.{dtype}"


def test_several_end_tokens_are_all_known(world: TinyWorld, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [3, 259]
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert load(Settings(model=str(folder))).eos_token_ids == [3, 259]


def test_a_model_that_does_not_generate_is_refused_before_its_weights_are_read(
    tmp_path: Path,
) -> None:
    # for a BERT, transformers would offer a causal head as well
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.save_pretrained(tmp_path)
    for ask in (check, load):
        with pytest.raises(UnsupportedModel) as refused:
            ask(Settings(model=str(tmp_path)))
        assert str(refused.value).startswith(f"the model {tmp_path} cannot be served: ")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedModel, match="t5 is not a causal language model"):
        check(Settings(model=str(tmp_path)))


@pytest.mark.parametrize("content", [None, "{", json.dumps({"model_type": "no-such-thing"})])
def test_a_folder_without_a_model_in_it_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel) as refused:
        check(Settings(model=str(tmp_path)))
    assert "\n" not in str(refused.value)


def test_a_refusal_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(UnsupportedModel("m", "no")))
    assert (error.model, error.why, error.code) == ("m", "no", "unsupported_model")
