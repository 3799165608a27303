from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hotswap_lib import (
    Adapter,
    AdapterConfigInvalid,
    AdapterFormatRefused,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRefused,
    Slot,
    load_adapter,
    pack,
)

COMMIT = "c" * 40
Adapters = dict[str, Path]


def test_a_directory_gives_what_safetensors_reads_from_it(adapters: Adapters) -> None:
    adapter = load_adapter(str(adapters["wide"]))
    expected = load_file(adapters["wide"] / "adapter_model.safetensors")
    assert adapter.name == "wide"
    assert adapter.config["r"] == 8
    assert adapter.tensors.keys() == expected.keys()
    assert all(torch.equal(adapter.tensors[key], expected[key]) for key in expected)


def test_path_string_and_name_lead_to_the_same_digest(adapters: Adapters) -> None:
    one = load_adapter(adapters["wide"])
    other = load_adapter(f"{adapters['wide']}/", name="support-bot")
    assert other.name == "support-bot"
    assert other.revision.digest == one.revision.digest
    assert load_adapter(one) is one
    assert load_adapter(one, name="support-bot").revision == other.revision


def test_different_adapters_are_different_revisions(adapters: Adapters) -> None:
    assert len({load_adapter(path).revision.digest for path in adapters.values()}) == len(adapters)


def test_a_file_overwritten_after_loading_does_not_change_the_adapter(
    adapters: Adapters, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["wide"], tmp_path / "wide"))
    adapter = load_adapter(folder)
    with (folder / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate(10)
    again = Adapter(name="wide", config=adapter.config, tensors=adapter.tensors)
    assert again.revision == adapter.revision


def test_a_subfolder_names_the_adapter(adapters: Adapters) -> None:
    adapter = load_adapter(adapters["wide"].parent, subfolder="attention")
    assert adapter.revision == load_adapter(adapters["attention"]).revision


def test_an_fsspec_uri_is_read_each_file_once(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        memory.pipe_file(f"/bucket/wide/{file}", (adapters["wide"] / file).read_bytes())
    reads: list[str] = []
    cat_file = type(memory).cat_file

    def counted(filesystem: Any, path: str) -> Any:
        reads.append(path)
        return cat_file(filesystem, path)

    monkeypatch.setattr(type(memory), "cat_file", counted)
    adapter = load_adapter("memory://bucket/wide")
    assert adapter.revision == load_adapter(adapters["wide"]).revision
    assert len(reads) == 2
    assert load_adapter("memory://bucket", subfolder="wide").revision == adapter.revision


def test_a_file_uri_is_the_directory(adapters: Adapters) -> None:
    adapter = load_adapter(f"file://{adapters['wide']}")
    assert adapter.revision == load_adapter(adapters["wide"]).revision


@pytest.mark.parametrize("uri", ["memory://bucket/nothing", "nosuchscheme://bucket/adapter"])
def test_a_uri_with_nothing_behind_it_is_not_found(uri: str) -> None:
    with pytest.raises(AdapterNotFound):
        load_adapter(uri)


@pytest.fixture
def hub_cache(adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one repository in it, and no Hub."""
    repository = tmp_path / "models--team--wide"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(adapters["wide"], repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_read_from_the_cache_offline(hub_cache: Path, adapters: Adapters) -> None:
    adapter = load_adapter("team/wide", cache_dir=hub_cache)
    assert adapter.revision == load_adapter(adapters["wide"]).revision
    at_commit = load_adapter("team/wide", cache_dir=hub_cache, revision=COMMIT)
    assert at_commit.revision == adapter.revision


def test_a_hub_repository_with_a_pickle_only_is_refused(hub_cache: Path) -> None:
    snapshot = hub_cache / "models--team--wide" / "snapshots" / COMMIT
    (snapshot / "adapter_model.safetensors").rename(snapshot / "adapter_model.bin")
    with pytest.raises(AdapterFormatRefused, match="pickle"):
        load_adapter("team/wide", cache_dir=hub_cache)


@pytest.mark.parametrize("source", ["team/nothing", "/no/such/dir", "a/b/c", "what is this?", ""])
def test_what_leads_nowhere_is_not_found_with_a_sentence(hub_cache: Path, source: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        load_adapter(source, cache_dir=hub_cache)
    assert caught.value.code == "adapter_not_found"
    assert "\n" not in str(caught.value)


def test_a_missing_path_object_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound):
        load_adapter(tmp_path / "nothing")


def _remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def _write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_instead(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "code"),
    [
        (_remove("adapter_config.json"), AdapterConfigInvalid, "adapter_config_invalid"),
        (_write("adapter_config.json", b"{nope"), AdapterConfigInvalid, "adapter_config_invalid"),
        (_write("adapter_config.json", b"[]"), AdapterConfigInvalid, "adapter_config_invalid"),
        (
            _write("adapter_config.json", b"\xff\xfe"),
            AdapterConfigInvalid,
            "adapter_config_invalid",
        ),
        (_remove("adapter_model.safetensors"), AdapterNotFound, "adapter_not_found"),
        (_truncate, AdapterFormatRefused, "adapter_format"),
        (_write("adapter_model.safetensors", b""), AdapterFormatRefused, "adapter_format"),
        (_write("adapter_model.safetensors", b"x" * 99), AdapterFormatRefused, "adapter_format"),
        (_pickle_instead, AdapterFormatRefused, "adapter_format"),
    ],
)
def test_a_damaged_directory_is_refused_with_a_stable_code(
    edit: Callable[..., Path],
    damage: Callable[[Path], object],
    error: type[AdapterRefused],
    code: str,
) -> None:
    folder = edit("wide")
    damage(folder)
    with pytest.raises(error) as caught:
        load_adapter(folder)
    assert type(caught.value) is error
    assert caught.value.code == code
    assert caught.value.adapter == folder.name


def test_a_directory_name_becomes_a_name_that_a_revision_can_have(
    adapters: Adapters, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters["wide"], tmp_path / "my bot: v@2")
    assert load_adapter(folder).name == "my-bot-v-2"
    with pytest.raises(AdapterNameInvalid):
        load_adapter(folder, name="my bot")


def test_keys_saved_from_a_compiled_model_lose_their_prefix(
    adapters: Adapters, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["wide"], tmp_path / "compiled"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({f"base_model.model._orig_mod.{k[17:]}": v for k, v in tensors.items()}, file)
    assert load_adapter(folder).revision.digest == load_adapter(adapters["wide"]).revision.digest


@pytest.mark.parametrize("name", ["wide", "attention", "rslora", "patterns", "one-module"])
def test_an_adapter_copied_out_of_a_model_is_the_one_on_disk(
    tiny: Any, adapters: Adapters, name: str
) -> None:
    model = tiny.peft_model(adapters[name])
    adapter = Adapter.from_peft_model(model, name=name)
    assert adapter.revision == load_adapter(adapters[name]).revision
    json.dumps(adapter.config)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data.zero_()
    assert Adapter.from_peft_model(model, name=name).revision != adapter.revision


def test_an_adapter_that_the_model_does_not_have_is_not_found(
    tiny: Any, adapters: Adapters
) -> None:
    with pytest.raises(AdapterNotFound, match="default"):
        Adapter.from_peft_model(tiny.peft_model(adapters["wide"]), "other")


def test_a_config_as_peft_holds_it_in_memory_is_taken(slot: Slot, adapters: Adapters) -> None:
    on_disk = load_adapter(adapters["attention"])
    config = LoraConfig.from_pretrained(str(adapters["attention"])).to_dict()
    assert isinstance(config["target_modules"], set)
    adapter = Adapter(name="attention", config=config, tensors=on_disk.tensors)
    assert adapter.revision == on_disk.revision
    pack(adapter, slot.layout).check()


def test_an_adapter_in_memory_pickles(adapters: Adapters) -> None:
    adapter = load_adapter(adapters["attention"])
    assert pickle.loads(pickle.dumps(adapter)).revision == adapter.revision
