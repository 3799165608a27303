"""The names that the package exports, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import hotswap_lib

PUBLIC = [
    "BASE",
    "Adapter",
    "AdapterConfigInvalid",
    "AdapterFormatRefused",
    "AdapterImage",
    "AdapterMerged",
    "AdapterNameInvalid",
    "AdapterNotFound",
    "AdapterRefused",
    "AlreadyCompiled",
    "CompileGuard",
    "Envelope",
    "FeatureOutsideEnvelope",
    "ForeignStaged",
    "HotswapError",
    "ImageCorrupted",
    "ImageRefused",
    "ImageUnreadable",
    "Inspection",
    "InvalidEnvelope",
    "Layout",
    "LayoutMismatch",
    "MissingTensor",
    "NonFinite",
    "NotPrepared",
    "NothingToRollBack",
    "PaddingCost",
    "RankMismatch",
    "RankOverEnvelope",
    "Receipt",
    "RecompiledAfterWarmup",
    "Revision",
    "ShapeMismatch",
    "Slot",
    "SlotTensorMoved",
    "Staged",
    "TargetOutsideEnvelope",
    "VerifyFailed",
    "hotswap_adapter",
    "inspect_adapter",
    "load_adapter",
    "load_image",
    "null_image",
    "pack",
    "padding_cost",
    "prepare",
    "prepare_model_for_compiled_hotswap",
    "save_image",
    "sketch_layout",
    "suggest_envelope",
]


def test_the_public_names_are_these() -> None:
    assert hotswap_lib.__all__ == PUBLIC


def test_every_public_name_resolves_to_its_modules_object() -> None:
    for name in PUBLIC:
        value = getattr(hotswap_lib, name)
        if module := getattr(value, "__module__", None):
            assert getattr(import_module(module), name) is value
    assert set(PUBLIC) <= set(dir(hotswap_lib))


def test_type_checkers_see_the_names_that_are_imported_on_first_use() -> None:
    tree = ast.parse(Path(hotswap_lib.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = {
        alias.name: f"hotswap_lib.{node.module}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(imports) == sorted(PUBLIC)
    for name, module in imports.items():
        assert getattr(import_module(module), name) is getattr(hotswap_lib, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(hotswap_lib, "no_such_name")


def test_errors_revisions_and_envelopes_need_no_torch() -> None:
    code = (
        "import sys, hotswap_lib\n"
        "hotswap_lib.Revision.parse('a@' + '0' * 64), hotswap_lib.AdapterRefused\n"
        "hotswap_lib.Envelope(max_rank=8, dtype='bfloat16')\n"
        "found = {'torch', 'peft', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
