"""`hotswap inspect`, in process."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from hotswap_lib import suggest_envelope
from serve_app.client import cli
from serve_app.client.cli_options import Exit
from serve_app.replica.loading import envelope
from serve_app.settings import parse

ADAPTERS = sorted(
    str(path) for path in (Path(cli.__file__).parents[1] / "adapters").iterdir() if path.is_dir()
)


def test_it_shows_the_adapters_and_one_envelope_for_all() -> None:
    result = CliRunner().invoke(cli.app, ["inspect", *ADAPTERS], terminal_width=100)
    assert result.exit_code == 0, result.output
    assert "smallest envelope: max_rank=16 target_modules=down_proj," in result.output
    assert "rsLoRA" in result.output
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in result.output


def test_the_envelope_is_valid_as_settings_of_the_server() -> None:
    result = CliRunner().invoke(cli.app, ["inspect", *ADAPTERS], terminal_width=100)
    line = next(line for line in result.output.splitlines() if "smallest envelope: " in line)
    words = line.partition("smallest envelope: ")[2].split()
    parsed = parse(dict(word.split("=", 1) for word in words))
    assert envelope(parsed) == suggest_envelope(ADAPTERS)


def test_as_json_it_is_one_document_whose_bytes_add_up() -> None:
    result = CliRunner().invoke(cli.app, ["inspect", *ADAPTERS, "--json"])
    document = json.loads(result.output)
    assert document["envelope"]["max_rank"] == 16
    assert [Path(one["source"]).name for one in document["adapters"]] == [
        Path(path).name for path in ADAPTERS
    ]
    for one in document["adapters"]:
        cost = one["cost"]
        parts = ("own_bytes", "rank_bytes", "absent_bytes", "gap_bytes")
        assert sum(cost[part] for part in parts) == cost["image_bytes"]
        assert one["digest"].startswith(one["revision"].partition("@")[2])


def test_a_missing_adapter_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "nothing")])
    assert result.exit_code == Exit.REFUSED
    assert "[adapter_not_found]" in result.stderr
    assert len(result.stderr.splitlines()) == 1
