"""Adapters from a Hub on the loopback interface, and from the cache that they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from hotswap_lib import AdapterConfigInvalid, AdapterFormatRefused, AdapterNotFound, load_adapter

from . import fake_hub
from .fake_hub import FakeHub

Adapters = dict[str, Path]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub.running() as hub:
        yield hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_an_adapter_is_downloaded_once_and_nothing_else_is(
    hub: FakeHub, adapters: Adapters, tmp_path: Path
) -> None:
    others = {"optimizer.pt": b"x" * 100, "adapter_model.bin": b"x"}
    hub.push_folder(adapters["wide"], more=others)
    for _ in range(2):
        adapter = load_adapter("team/bot", cache_dir=tmp_path)
        assert adapter.name == "bot"
        assert adapter.revision.digest == load_adapter(adapters["wide"]).revision.digest
    assert sorted(hub.downloads) == [CONFIG, WEIGHTS]


def test_a_branch_a_commit_and_a_subfolder_are_found(
    hub: FakeHub, adapters: Adapters, tmp_path: Path
) -> None:
    first = hub.push_folder(adapters["wide"])
    hub.push_folder(adapters["attention"], prefix="v2/")
    old = load_adapter("team/bot", revision=first, cache_dir=tmp_path)
    new = load_adapter("team/bot", revision="main", subfolder="v2", cache_dir=tmp_path)
    assert old.revision.digest == load_adapter(adapters["wide"]).revision.digest
    assert new.name == "v2"
    assert new.revision.digest == load_adapter(adapters["attention"]).revision.digest


def test_a_push_during_a_download_does_not_mix_two_commits(
    hub: FakeHub, adapters: Adapters, tmp_path: Path
) -> None:
    hub.push_folder(adapters["wide"])
    hub.push_after_resolving = {
        path.name: path.read_bytes() for path in adapters["attention"].iterdir()
    }
    adapter = load_adapter("team/bot", cache_dir=tmp_path)
    assert adapter.revision.digest == load_adapter(adapters["wide"]).revision.digest


def test_a_pickle_is_noticed_and_not_downloaded(
    hub: FakeHub, adapters: Adapters, tmp_path: Path
) -> None:
    config = (adapters["wide"] / CONFIG).read_bytes()
    hub.push({CONFIG: config, "adapter_model.bin": b"x"})
    with pytest.raises(AdapterFormatRefused, match="pickle"):
        load_adapter("team/bot", cache_dir=tmp_path)
    assert hub.downloads == [CONFIG]


def test_a_repository_without_an_adapter_is_refused_by_what_it_lacks(
    hub: FakeHub, adapters: Adapters, tmp_path: Path
) -> None:
    hub.push({"README.md": b"nothing"})
    with pytest.raises(AdapterNotFound, match=f"no {CONFIG} and no {WEIGHTS}"):
        load_adapter("team/bot", cache_dir=tmp_path)
    hub.push({WEIGHTS: (adapters["wide"] / WEIGHTS).read_bytes()})
    with pytest.raises(AdapterConfigInvalid, match=f"no {CONFIG}"):
        load_adapter("team/bot", cache_dir=tmp_path)
    with pytest.raises(AdapterNotFound, match="cannot be read"):
        load_adapter("team/bot", revision="no-such-branch", cache_dir=tmp_path)
    with pytest.raises(AdapterNotFound, match="cannot be read"):
        load_adapter("team/other", cache_dir=tmp_path)


def test_what_was_downloaded_is_read_from_the_cache_when_the_hub_is_gone(
    adapters: Adapters, tmp_path: Path
) -> None:
    with fake_hub.running() as hub:
        commit = hub.push_folder(adapters["wide"])
        expected = load_adapter("team/bot", cache_dir=tmp_path).revision
        hub.main = ""  # the repository was deleted
        for revision in (None, commit):
            adapter = load_adapter("team/bot", revision=revision, cache_dir=tmp_path)
            assert adapter.revision == expected


@pytest.mark.usefixtures("offline")
def test_offline_the_cache_is_read_and_what_is_not_in_it_is_not_found(
    adapters: Adapters, tmp_path: Path
) -> None:
    with fake_hub.running() as hub:
        commit = hub.push_folder(adapters["wide"])
        expected = load_adapter("team/bot", cache_dir=tmp_path).revision
    for revision in (None, commit):
        adapter = load_adapter("team/bot", revision=revision, cache_dir=tmp_path)
        assert adapter.revision == expected
    for repo, revision in (("team/bot", "other"), ("team/other", None)):
        with pytest.raises(AdapterNotFound, match="cannot be read"):
            load_adapter(repo, revision=revision, cache_dir=tmp_path)
