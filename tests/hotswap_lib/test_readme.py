"""The package's README says what the tests show, and its code runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import hotswap_lib
from hotswap_lib.layer_kinds import KINDS

README = Path(hotswap_lib.__file__).with_name("README.md")
TESTS = Path(__file__).parents[1]


def _table() -> list[tuple[str, str]]:
    section = (
        README.read_text().partition("## Supported models and adapters")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| (.+) \| (.+) \|$", section, re.MULTILINE)
    return [(what, proof) for what, proof in rows if what not in ("what", "---")]


def _code(heading: str) -> str:
    section = README.read_text().partition(heading)[2]
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize(("what", "proof"), _table())
def test_every_row_of_the_support_table_names_a_test_that_there_is(what: str, proof: str) -> None:
    if proof == "nothing":
        assert "not run here" in what
        return
    path, _, test = proof.strip("`").partition("::")
    tree = ast.parse((TESTS / path).read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not test or test in tests


def test_the_support_table_names_every_kind_of_layer_and_no_other() -> None:
    named = re.findall(r"`((?:layer|[a-z]+)\.[A-Z]\w+)`", "\n".join(what for what, _ in _table()))
    assert {name for name in named if not name.startswith("torch.")} == set(KINDS)


def test_the_quick_start_runs_as_it_stands(tiny: Any, adapters: dict[str, Path]) -> None:
    code = _code("# hotswap_lib").replace('"my-org/support-bot"', "path")
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 5
    names: dict[str, Any] = {"model": tiny.base(), "torch": torch, "path": adapters["wide"]}
    before, rollback = code.rsplit("\n", 2)[:2]
    exec(before.replace("torch.compile(slot.model)", "slot.model"), names)
    slot = names["slot"]
    assert slot.revision.name == "wide"
    exec(rollback, names)
    assert slot.revision == hotswap_lib.BASE


def test_the_recipe_for_ci_packs_without_weights_for_the_real_model(
    tiny: Any, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    code = _code("## Images as files").replace('"./support-v2"', "path")
    config: LlamaConfig = tiny.base().config
    names: dict[str, Any] = {
        **{name: getattr(hotswap_lib, name) for name in hotswap_lib.__all__},
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "config": config,
        "path": adapters["wide"],
        "torch": torch,
    }
    exec(code, names)
    real = hotswap_lib.prepare(tiny.base(), envelope=hotswap_lib.Envelope(max_rank=64))
    real.commit(real.stage(hotswap_lib.load_image(tmp_path / "support-v2.image")))
    real.verify()
    assert real.revision.name == "wide"


def test_every_name_that_the_readme_imports_is_public() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = "\n".join(blocks)
    imported = re.findall(r"from hotswap_lib import (.+)", code)
    names = {name.strip() for line in imported for name in line.split(",")}
    assert names
    assert names <= set(hotswap_lib.__all__)
