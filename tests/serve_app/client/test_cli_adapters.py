"""`hotswap adapters`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.serve_app.client.fake_fleet import FakeFleet, hotswap


def test_adapters_are_loaded_listed_and_unloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bot").mkdir()
    monkeypatch.chdir(tmp_path)
    fake = FakeFleet()
    here = str(tmp_path / "bot")
    line = f"bot  bot@3f2a9c1d  2/2 serve it  {here}\ngeneration 7\n"
    loaded = hotswap(fake, "adapters", "load", "bot", "./bot", "--expected-generation", "6")
    assert (loaded.exit_code, loaded.stdout) == (0, line)
    assert hotswap(fake, "adapters", "list").stdout == line
    assert hotswap(fake, "adapters", "load", "bot", "s3://b/bot", "--in-place").exit_code == 0
    assert hotswap(fake, "adapters", "unload", "bot").exit_code == 0
    assert hotswap(fake, "adapters", "list").stdout == "no adapters are loaded\ngeneration 7\n"
    named = {"lora_name": "bot", "lora_path": here, "load_inplace": False}
    assert fake.asked == [
        named | {"expected_generation": 6},
        {"lora_name": "bot", "lora_path": "s3://b/bot", "load_inplace": True},
        {"lora_name": "bot"},
    ]


def test_a_name_that_is_taken_exits_1() -> None:
    fake = FakeFleet()
    hotswap(fake, "adapters", "load", "bot", "x")
    rejected = hotswap(fake, "adapters", "load", "bot", "y")
    assert (rejected.exit_code, rejected.stdout) == (1, "")
    assert rejected.stderr == "error: bot@1 is loaded as 'bot' [adapter_already_loaded]\n"


@pytest.mark.parametrize("command", ["load other x", "unload bot", "list"])
def test_every_adapters_command_has_json(command: str) -> None:
    fake = FakeFleet()
    hotswap(fake, "adapters", "load", "bot", "x")
    document = json.loads(hotswap(fake, "adapters", *command.split(), "--json").stdout)
    assert document["generation"] == 7
