"""`hotswap`: its exit codes, its options, and the commands about the whole fleet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from serve_app.client.cli_options import Exit
from serve_app.wire.admin import FleetView
from tests.serve_app.client.fake_fleet import NEW, OLD, FakeFleet, hotswap, served


def test_status_shows_the_fleet_and_exits_0() -> None:
    result = hotswap(FakeFleet(), "status")
    assert result.exit_code == 0
    assert OLD in result.stdout
    assert "abc123" in result.stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_watched_status_goes_on_until_ctrl_c(as_json: list[str]) -> None:
    class FakeFleetUntilCtrlC(FakeFleet):
        looks = 0

        def fleet(self) -> FleetView:
            self.looks += 1
            if self.looks == 3:
                raise KeyboardInterrupt
            return super().fleet()

    result = hotswap(FakeFleetUntilCtrlC(), "status", "--watch", *as_json)
    assert result.exit_code == 130
    assert result.stdout.count("abc123") == 1
    assert not as_json or FleetView.model_validate_json(result.stdout) == FakeFleet().fleet()


def test_undo_watches_the_rollout_that_it_makes() -> None:
    fake = FakeFleet()
    fake.enter("succeeded")
    result = hotswap(fake, "undo", "--watch")
    assert result.exit_code == 0
    assert "succeeded" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", ["status", "history", "rollout list", "rollout get r1"])
def test_every_command_that_shows_a_document_has_json(command: str) -> None:
    fake = FakeFleet(states=[])
    fake.enter("progressing")
    result = hotswap(fake, *command.split(), "--json")
    assert result.exit_code == 0
    assert isinstance(json.loads(result.stdout), dict)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["rollout", "start", "--adapter", "missing"],
            "no adapter at /missing [adapter_not_found]",
        ),
        (["undo"], "nothing was stable before [nothing_to_undo]"),
        (["rollout", "abort", "r9"], "there is no such rollout [no_such_rollout]"),
        (["rollout", "get", "r9", "--watch"], "there is no such rollout [no_such_rollout]"),
    ],
)
def test_a_rejected_request_exits_1_with_one_line(args: list[str], line: str) -> None:
    result = hotswap(FakeFleet(), *args)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {line}\n")


@pytest.mark.parametrize(
    "args",
    [
        ["rollout", "start"],
        ["rollout", "start", "--adapter", "x", "--strategy", "hope"],
        ["rollout", "start", "--adapter", "x", "--max-unavailable", "0"],
        ["rollout", "start", "--adapter", "x", "--in-flight", "pause"],
        ["adapters", "load", "bot"],
        ["adapters", "unload"],
        ["rollout", "abort", " "],
        ["--url", "localhost:8000", "status"],
        ["--token", "a\nb", "status"],
        ["dance"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_sends_nothing(args: list[str]) -> None:
    fake = FakeFleet()
    result = hotswap(fake, *args)
    assert (result.exit_code, fake.tokens) == (2, set())
    assert "Error: " in result.stderr


def test_the_address_and_the_token_come_from_the_environment_or_the_option() -> None:
    fake = FakeFleet()
    env: dict[str, str | None] = {"HOTSWAP_URL": "http://env.test", "HOTSWAP_TOKEN": "from-env"}
    start = ["rollout", "start", "--adapter", "x"]
    assert "--url http://env.test rollout" in hotswap(fake, *start, env=env).stdout
    given = ["--url", "http://opt.test", "--token", "from-option", *start]
    assert "--url http://opt.test rollout" in hotswap(fake, *given, env=env).stdout
    assert fake.tokens == {"Bearer from-env", "Bearer from-option"}


def test_ctrl_c_exits_130_with_one_line_that_the_rollout_goes_on() -> None:
    fake = FakeFleet(interrupt_at="progressing")
    result = hotswap(fake, "rollout", "start", "--adapter", "x", "--watch")
    assert result.exit_code == 130
    assert result.stderr == "stopped; a rollout that was accepted goes on (hotswap status)\n"


@pytest.mark.parametrize("command", ["", "rollout", "rollout start", "adapters", "status", "undo"])
def test_every_level_has_help(command: str) -> None:
    result = hotswap(FakeFleet(), *command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert "--help" in result.stdout


def test_help_documents_the_exit_codes_and_the_environment() -> None:
    text = hotswap(FakeFleet(), "--help").stdout
    for code in (0, 2, *Exit):
        assert f"\n    {int(code):<4} " in text
    assert "HOTSWAP_URL" in text
    assert "HOTSWAP_TOKEN" in text


def test_version_is_printed() -> None:
    result = hotswap(FakeFleet(), "--version")
    assert (result.exit_code, result.stdout[:7]) == (0, "hotswap")


def run_module(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"NO_PROXY": "127.0.0.1", "PYTHONIOENCODING": "latin-1"}
    env.pop("FORCE_COLOR", None)
    command = [sys.executable, "-m", "serve_app.client.cli", *args]
    return subprocess.run(command, env=env, capture_output=True, encoding="latin-1", timeout=60)


def test_a_pipeline_runs_the_module_against_a_real_server() -> None:
    with served(FakeFleet()) as url:
        # latin-1 has no arrow: a poor locale must cost a character, not the exit code
        done = run_module("--url", url, "rollout", "start", "--adapter", "x", "--watch")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{OLD} ? {NEW}" in done.stdout
        assert "succeeded" in done.stdout
        rejected = run_module("--url", url, "rollout", "get", "r9")
        assert rejected.returncode == 1
        assert rejected.stderr == "error: there is no such rollout [no_such_rollout]\n"


def test_a_closed_port_exits_4_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = run_module("--url", url, "status", "--watch")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"error: cannot reach the server at {url}: ")
    assert done.stderr.endswith(" [unreachable]\n")
    assert done.stderr.count("\n") == 1


def test_the_cli_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys, serve_app.client.cli\n"
        "heavy = {'ray', 'torch', 'transformers', 'peft', 'hotswap_lib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
