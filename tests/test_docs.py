"""README.md and docs/: the code in them runs, and what they name exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import jsonschema
import pytest
import typer.main
import yaml
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

import hotswap_lib
from hotswap_lib import BASE
from serve_app.client import cli
from serve_app.client.http import HotswapClient
from serve_app.gateway.http_errors import describe
from serve_app.openai.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serve_app.rollout import errors as rollout_errors
from serve_app.rollout.plan import Plan
from serve_app.settings import Settings, parse
from serve_app.wire import admin
from serve_app.wire import errors as wire_errors
from tests import pages
from tests.pages import NEEDS_A_FLEET, PAGES, README, ROOT, Block

HTTP_API = ROOT / "docs" / "http-api.md"
ROLLOUTS = ROOT / "docs" / "rollouts.md"
SETTINGS = ROOT / "docs" / "settings.md"
OURS = ("serve_app", "hotswap_lib", "tests", "examples", "benchmarks", "docs")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ---- pages and links ----------------------------------------------------------------------------


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(pages.read(README).splitlines()) <= 200


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in pages.links(README)}
    assert set(PAGES) - {README} <= linked


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in pages.anchors(file), f"{page.name} links to {target}"


@every_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    missing = [name for name in pages.inline_code(page) if is_path(name) and not exists(name)]
    assert not missing, f"{page.name} names {missing}"


@every_page
def test_every_dotted_name_of_ours_can_be_imported(page: Path) -> None:
    pattern = rf"(?:{'|'.join(OURS)})(?:\.\w+)+(?::\w+)?"
    for name in pages.inline_code(page):
        if re.fullmatch(pattern, name):
            module, _, attribute = name.partition(":")
            assert (not attribute and is_module(module)) or named(name) is not None


def is_path(name: str) -> bool:
    inside = name.partition("/")[0] in OURS and "/" in name
    return inside or re.fullmatch(r"[\w*.-]+\.(py|md|toml|txt)", name) is not None


def exists(name: str) -> bool:
    path, _, test = name.partition("::")
    found = sorted(ROOT.glob(path) if "/" in path else ROOT.glob(f"[!.]*/**/{path}"))
    if not found and "/" not in path:
        found = sorted(ROOT.glob(path))
    return bool(found) and (not test or test in functions(found[0]))


def is_module(name: str) -> bool:
    """True if there is such a module; it is not imported, because that may take seconds."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def named(name: str) -> Any:
    """The module, or the object in a module, that a dotted name with or without a colon names."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, attribute = module.rpartition(".")
        found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


@cache
def functions(path: Path) -> set[str]:
    """Names of a file's functions and classes, and `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {
                f"{node.name}.{each.name}"
                for each in inner
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def test_every_promise_names_a_test_that_shows_it() -> None:
    promises = pages.rows(pages.section(README, "Promises, and the test of each"))
    assert len(promises) > 10
    for promise, proof in promises:
        assert any(name.startswith("tests/") for name in re.findall(r"`([^`]+)`", proof)), promise


# ---- code blocks --------------------------------------------------------------------------------


def test_every_block_is_in_a_language_that_is_tested_here() -> None:
    languages = {block.language for block in pages.all_blocks()}
    assert languages <= {"", "bash", "python", "yaml", "json", "mermaid"}


@pytest.mark.parametrize("block", pages.all_blocks("python"), ids=str)
def test_python_runs_or_needs_a_fleet_and_has_imports_that_exist(
    block: Block, tmp_path: Path
) -> None:
    if block.marker != NEEDS_A_FLEET:
        run(block.text, tmp_path)
        return
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for each in node.names:
                assert hasattr(importlib.import_module(node.module), each.name), each.name
        elif isinstance(node, ast.Import):
            for each in node.names:
                importlib.import_module(each.name)


def run(text: str, folder: Path) -> None:
    """Execute a block about the library, over a tiny model and an adapter on this disk."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.e2e.tiny_world import make_world

    world = make_world(folder)
    model = LlamaForCausalLM.from_pretrained(world.model).eval()
    names: dict[str, Any] = {"torch": torch, "model": model, "path": world.adapter("alpha")}
    exec(text.replace('"my-org/support-bot"', "path"), names)
    assert names["slot"].revision == BASE, "the last line of the block rolls back"


def test_the_script_for_handles_is_the_file_that_the_end_to_end_tests_run() -> None:
    script = (ROOT / "examples" / "handles.py").read_text(encoding="utf-8")
    assert script in [block.text for block in pages.blocks(ROLLOUTS, "python")]


def test_the_plan_of_the_documentation_is_valid_and_names_every_field() -> None:
    [block] = pages.blocks(ROLLOUTS, "yaml")
    fields = yaml.safe_load(block.text)
    Plan.model_validate(fields)
    assert set(fields) == set(Plan.model_fields)


@pytest.mark.parametrize("block", pages.all_blocks("json"), ids=str)
def test_every_json_document_is_an_error_as_the_server_sends_it(block: Block) -> None:
    given = json.loads(block.text)
    assert admin.ErrorBody.model_validate(given).model_dump() == given


# ---- shell --------------------------------------------------------------------------------------

COMMANDS = {
    f"{block}-{' '.join(words)[:60]}": words
    for block in pages.all_blocks("bash")
    for words in pages.commands(block)
}
STARTS = {id: words for id, words in COMMANDS.items() if words[1:3] == ["rollout", "start"]}


INLINE = {
    f"{page.name}-{code}": shlex.split(re.sub(r"[\[\]]", "", code))  # what is optional is used
    for page in PAGES
    for code in pages.inline_code(page)
    if code.startswith(("hotswap ", "make ", "python -m ", "serve deploy ", ".venv/bin/"))
}


@pytest.mark.parametrize("words", [*COMMANDS.values(), *INLINE.values()], ids=[*COMMANDS, *INLINE])
def test_every_command_of_the_documentation_can_be_run(words: list[str]) -> None:
    program, *arguments = words
    check = {
        "hotswap": check_hotswap,
        "make": check_make,
        "serve": check_serve,
        "curl": check_curl,
        "python": check_python,
    }.get(program.removeprefix(".venv/bin/"))
    assert check is not None, f"teach this test to check {program!r}"
    check(arguments)


def check_hotswap(arguments: list[str]) -> None:
    """The words are parsed by the real command, whose functions are not called."""
    command = typer.main.get_command(cli.app)
    disarm(command)
    command.main(arguments, prog_name="hotswap", standalone_mode=False)  # raises a usage error
    for word in arguments:
        if word.startswith(OURS):
            assert (ROOT / word).exists(), word


def disarm(command: Any) -> None:
    command.callback = lambda **_given: None
    for each in getattr(command, "commands", {}).values():
        disarm(each)


def check_make(arguments: list[str]) -> None:
    goals = [word for word in arguments if "=" not in word]
    assert set(goals) <= targets()


def check_serve(arguments: list[str]) -> None:
    verb, what, *given = arguments
    if verb == "deploy":
        [application] = yaml.safe_load((ROOT / what).read_text())["applications"]
        what, settings = application["import_path"], application["args"]
    else:
        assert verb == "run"
        settings = dict(word.split("=", 1) for word in given)
    assert callable(named(what))
    parse(settings)


def check_python(arguments: list[str]) -> None:
    flag, module, *rest = arguments
    assert flag == "-m"
    if module == "pytest":
        assert all((ROOT / word).exists() for word in rest if not word.startswith("-"))
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    if module == "benchmarks.serving" and rest[:1] == ["--only"]:
        assert set(rest[1:]) <= set(named("benchmarks.serving:NAMES"))
    for word in rest:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{module} has no option {word}"
        elif word.startswith(OURS):
            assert (ROOT / word).exists(), word


def check_curl(arguments: list[str]) -> None:
    method, url, body, headers = curl(arguments)
    route, operation = find(method, urlsplit(url).path)
    parameters = {(each["in"], each["name"]) for each in operation.get("parameters", [])}
    for name, _ in parse_qsl(urlsplit(url).query, strict_parsing=True):
        assert ("query", name) in parameters, f"{route} takes no {name}"
    for name in headers - {"content-type", "authorization"}:
        assert ("header", name) in parameters, f"{route} takes no header {name}"
    assert (body is not None) == ("requestBody" in operation), route
    if body is not None:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(json.loads(body), schema | {"components": openapi()["components"]})
        assert "content-type" in headers


def curl(arguments: list[str]) -> tuple[str, str, str | None, set[str]]:
    """Method, URL, body and lower-case header names of a command."""
    method, url, body, headers = None, "", None, set()
    words = iter(arguments)
    for word in words:
        match word:
            case "-s":
                pass
            case "-X":
                method = next(words)
            case "-d":
                body = next(words)
            case "-H":
                headers.add(next(words).partition(":")[0].lower())
            case _:
                url = word if "://" in word else f"http://{word}"
    return method or ("GET" if body is None else "POST"), url, body, headers


def find(method: str, path: str) -> tuple[str, dict[str, Any]]:
    for route, operations in openapi()["paths"].items():
        pattern = re.sub(r"\{\w+\}", "[^/]+", route)
        if re.fullmatch(pattern, path) and method.lower() in operations:
            operation: dict[str, Any] = operations[method.lower()]
            return route, operation
    raise AssertionError(f"there is no route {method} {path}")


@pytest.mark.parametrize("words", STARTS.values(), ids=STARTS)
def test_every_rollout_that_the_documentation_starts_is_a_plan_that_a_server_would_get(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [plan] = pages.blocks(ROLLOUTS, "yaml")
    (tmp_path / "plan.yaml").write_text(plan.text)
    monkeypatch.chdir(tmp_path)
    sent: list[Plan] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(Plan.model_validate_json(request.content))
        error = {"message": "no", "code": "fleet_not_ready"}
        return httpx.Response(503, json={"error": error})

    def connect(url: str, *, token: str | None) -> HotswapClient:
        return HotswapClient(url, token=token, transport=httpx.MockTransport(answer))

    result = CliRunner().invoke(cli.app, words[1:], obj=connect)
    assert sent, result.output


def test_the_table_of_make_targets_is_complete() -> None:
    table = pages.section(ROOT / "docs" / "development.md", "Set up")
    assert {row[0].strip("`").removeprefix("make ") for row in pages.rows(table)} == targets()


@cache
def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


def test_the_output_of_hotswap_inspect_is_what_the_documentation_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [shown] = [each for each in pages.all_blocks("") if "output: hotswap inspect" in each.marker]
    [words] = [
        words
        for block in pages.blocks(SETTINGS, "bash")
        for words in pages.commands(block)
        if words[:2] == ["hotswap", "inspect"]
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(cli.app, words[1:])
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.output.strip("\n").splitlines()]
    assert "\n".join(lines).strip("\n") == shown.text.strip("\n")


# ---- the HTTP API -------------------------------------------------------------------------------


@cache
def openapi() -> dict[str, Any]:
    from serve_app.gateway.deployment import build_app

    nothing: Any = None
    return build_app(Settings(), model=nothing, controller=nothing).openapi()


def test_the_table_of_routes_is_complete() -> None:
    found = re.findall(r"^\| `([A-Z]+) (/\S+)` \|", pages.read(HTTP_API), re.MULTILINE)
    made = [(method.upper(), path) for path, each in openapi()["paths"].items() for method in each]
    assert sorted(found) == sorted(made)


@pytest.mark.parametrize(
    ("heading", "column", "body"),
    [
        ("Chat and text completions", 1, ChatRequest),
        ("Chat and text completions", 2, CompletionRequest),
        ("Embeddings and classification", 1, EmbeddingRequest),
        ("Embeddings and classification", 2, ClassifyRequest),
        ("Loaded adapters", 1, admin.LoadAdapter),
        ("Loaded adapters", 2, admin.UnloadAdapter),
    ],
)
def test_the_table_of_fields_is_complete(heading: str, column: int, body: Any) -> None:
    table = pages.rows(pages.section(HTTP_API, heading))
    assert {row[0].strip("`") for row in table if row[column] == "yes"} == set(body.model_fields)


def test_every_header_and_query_parameter_is_documented() -> None:
    text = pages.read(HTTP_API)
    for operations in openapi()["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                assert parameter["in"] == "path" or f"`{parameter['name']}`" in text


def test_the_table_of_errors_has_every_code_with_its_status() -> None:
    table = pages.rows(pages.between(HTTP_API, "errors:"))
    documented = {code.strip("`"): int(status) for status, code, _ in table}
    assert len(documented) == len(table)
    for kind in error_classes():
        status, detail = describe(example(kind))
        assert documented.get(detail.code) == status, f"{kind.__name__}: {status} {detail.code}"


def error_classes() -> list[type[Exception]]:
    """Those that a server can answer with, but not the roots and those with codes of their own."""
    apart = {"InvalidRequest", "AppError", "RolloutError", "HotswapError"}
    found = [
        kind
        for module in (wire_errors, rollout_errors)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Exception) and name not in apart
    ]
    refused = [getattr(hotswap_lib, name) for name in hotswap_lib.__all__]
    return found + [
        kind
        for kind in refused
        if isinstance(kind, type) and issubclass(kind, hotswap_lib.AdapterRefused)
    ]


def example(kind: type[Exception]) -> Exception:
    """One of the class, with an argument of the right type for each parameter."""
    values = {"int": 1, "float": 1.0, "tuple[str, ...]": ("x",)}
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    required = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return kind(*(values.get(str(each.annotation), "x") for each in required))


# ---- tables that are compared with the code -----------------------------------------------------


def test_the_tables_of_settings_are_complete_with_values_and_defaults() -> None:
    documented = {
        name.strip("`"): (values, default)
        for name, values, default, _ in pages.rows(pages.read(SETTINGS))
    }
    expected = {
        name: (values(field), default(field)) for name, field in Settings.model_fields.items()
    }
    assert documented == expected


def default(field: FieldInfo) -> str:
    if field.default is None:
        return "none"
    return f"`{json.dumps(field.default).strip(chr(34))}`"


def values(field: FieldInfo) -> str:
    """The type and its bounds as a person reads them: `number, above 0`."""
    schema = Settings.model_json_schema()["properties"][field_name(field)]
    [kind] = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    if "enum" in kind:
        return ", ".join(f"`{each}`" for each in kind["enum"])
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "`true`, `false`",
    }
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    given = [f"{word} {kind[bound]:g}" for bound, word in bounds.items() if bound in kind]
    return ", ".join([words[kind["type"]], *given])


def field_name(field: FieldInfo) -> str:
    return next(name for name, each in Settings.model_fields.items() if each is field)


def test_a_chat_request_enters_at_most_twelve_files_and_the_page_names_them() -> None:
    page = ROOT / "docs" / "request-walk.md"
    way_in = pages.rows(pages.between(page, "walk:"))
    assert len({file for file, *_ in way_in}) <= 12
    for file, function, _ in pages.rows(pages.read(page)):
        path = ROOT / file.strip("`")
        assert function.strip("`") in functions(path), f"{file} has no {function}"


def test_every_file_that_a_chat_request_enters_is_on_the_page(tmp_path: Path) -> None:
    from tests.serve_app.walk import files_of_a_chat_request

    named = pages.inline_code(ROOT / "docs" / "request-walk.md")
    assert files_of_a_chat_request(tmp_path) - set(named) == set()


def test_the_layers_are_those_of_the_import_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    [layers] = [each["layers"] for each in contracts if each["name"].startswith("rooms:")]
    [shown] = [each for each in pages.all_blocks("") if each.marker.startswith("<!-- layers:")]
    assert shown.text.splitlines() == layers


def test_the_figures_of_the_readme_are_those_of_the_page_about_performance() -> None:
    table = pages.rows(pages.section(README, "Numbers"))
    measured = pages.read(ROOT / "docs" / "performance.md")
    figures = [figure for _, cell, _ in table for figure in re.findall(r"\d[\d.]*", cell)]
    assert figures
    assert [figure for figure in figures if figure not in measured] == []


def test_the_transition_table_has_its_marks() -> None:
    assert "stateDiagram" in pages.between(ROLLOUTS, "table:")
