"""The real default model with the adapters that come with the app."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hotswap_lib import pack
from serve_app.replica.embedded_model import ADAPTERS
from serve_app.replica.loading import Loaded, load
from serve_app.settings import Settings

pytestmark = pytest.mark.real_model
SHIPPED = sorted(path for path in ADAPTERS.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """As a replica loads it with default settings."""
    return load(Settings())


def ask(loaded: Loaded, question: str) -> str:
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.no_grad():
        out = loaded.slot.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32,
            eos_token_id=loaded.eos_token_ids,
        )
    text: str = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_every_shipped_adapter_changes_the_answer_visibly(loaded: Loaded) -> None:
    answers = {"base": ask(loaded, "What is the capital of France?")}
    for path in SHIPPED:
        loaded.slot.commit(loaded.slot.stage(pack(path, loaded.slot.layout)))
        answers[path.name] = ask(loaded, "What is the capital of France?")
    assert answers["base"] == "The capital of France is Paris."
    assert "Arrr" in answers["pirate"]
    assert answers["terse_json"].startswith("{")
    assert len(set(answers.values())) == len(SHIPPED) + 1
    assert all("Paris" in answer for answer in answers.values())


def test_the_shipped_adapters_differ_in_rank_alpha_and_targets(loaded: Loaded) -> None:
    configs = [dict(pack(path, loaded.slot.layout).config) for path in SHIPPED]
    for field in ("r", "lora_alpha", "target_modules"):
        assert len({str(config[field]) for config in configs}) == len(SHIPPED)


def test_they_are_a_few_megabytes_and_name_no_folder_of_the_machine_they_came_from() -> None:
    files = [file for path in SHIPPED for file in path.iterdir()]
    assert sum(file.stat().st_size for file in files) < 8e6
    for config in ADAPTERS.glob("*/adapter_config.json"):
        assert str(Path.home()) not in config.read_text()
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in config.read_text()
