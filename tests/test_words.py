"""Plain words and sizes: wording, lengths, loggers and private names of the product.

Every failure lists its places as `file:line`, with the rule that each of them breaks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("hotswap_lib", "serve_app")
CODE = (*PRODUCT, "examples", "benchmarks")
TEXTS = (".py", ".md", ".yaml", ".toml")

QUESTION_WORDS = {"what", "who", "whether", "where", "which", "how", "those"}
MOST_QUESTIONS = 0.02  # of all docstrings
VAGUE_PEOPLE = re.compile(r"\b(nobody|somebody|anybody|whoever|anyone|someone)\b", re.IGNORECASE)

FILE_LINES, CLASS_LINES, FUNCTION_LINES = 300, 200, 40
REASON = re.compile(r"(?:^|(?<=[.:!?]\s)|(?<=\n))Longer than (?:usual:|\d+ lines because) \S")

# Modules that look up other loggers than their own → the reason.
OTHER_LOGGERS = {"serve_app/logs.py": "passes the records of all modules on to Serve's logger"}

# Private names of other libraries belong in a `*_internals.py` module. `file:name` → the reason
# why one of them stays where it is.
PRIVATE_ELSEWHERE: dict[str, str] = {}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# ---- words --------------------------------------------------------------------------------------


def test_fewer_than_two_percent_of_the_docstrings_begin_with_a_question_word() -> None:
    found = [docstring for path in sources(CODE) for docstring in docstrings(path)]
    asking = [
        f"{place}: {text.splitlines()[0]}"
        for place, text in found
        if first_word(text) in QUESTION_WORDS
    ]
    report = f"{len(asking)} of {len(found)} docstrings begin with a question word"
    assert len(asking) <= MOST_QUESTIONS * len(found), listed(report, asking)


def test_the_text_says_who_does_a_thing() -> None:
    vague = [
        f"{where(path, number)}: {word} in {line.strip()[:90]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for word in VAGUE_PEOPLE.findall(line)
    ]
    assert not vague, listed("name the replica, the client, the operator, ...", vague)


# ---- sizes --------------------------------------------------------------------------------------


def test_a_file_a_class_or_a_function_of_the_product_is_short_or_gives_its_reason() -> None:
    long = [problem for path in sources(PRODUCT) for problem in too_long(path)]
    reason = "shorten it, or add a sentence 'Longer than usual: ...' to its docstring"
    assert not long, listed(reason, long)


@pytest.mark.parametrize(
    ("docstring", "given"),
    [
        ("A parser. Longer than usual: the grammar is one table.", True),
        ("A parser.\n\nLonger than usual: the grammar is one table.", True),
        ("A parser. Longer than 300 lines because the grammar is one table.", True),
        ("A parser, longer than usual: the grammar is one table.", False),
        ("A parser. Longer than usual:", False),
        (None, False),
    ],
)
def test_a_reason_is_a_sentence_of_its_own(docstring: str | None, given: bool) -> None:
    assert has_reason(docstring) == given


# ---- loggers and private names ------------------------------------------------------------------


def test_a_logger_is_named_for_its_module() -> None:
    others = [
        f"{where(path, node.lineno)}: {ast.unparse(node)}"
        for path in sources(PRODUCT)
        if str(path.relative_to(ROOT)) not in OTHER_LOGGERS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] == "getLogger"
        and ast.unparse(node) != "logging.getLogger(__name__)"
    ]
    assert not others, listed("use logging.getLogger(__name__)", others)


def test_private_names_of_others_are_used_in_internals_modules_only() -> None:
    reached = [
        f"{where(path, line)}: {use}"
        for path in sources(PRODUCT)
        if not path.name.endswith("_internals.py")
        for line, name, use in (*private_attributes(path), *private_imports(path))
        if f"{path.relative_to(ROOT)}:{name}" not in PRIVATE_ELSEWHERE
    ]
    assert not reached, listed("move the access to a *_internals.py module", reached)


def test_every_exception_for_a_private_name_is_still_needed() -> None:
    used = {
        f"{path.relative_to(ROOT)}:{name}"
        for path in sources(PRODUCT)
        for _, name, _ in (*private_attributes(path), *private_imports(path))
    }
    assert set(PRIVATE_ELSEWHERE) <= used


# ---- reading the source -------------------------------------------------------------------------


def listed(rule: str, places: list[str]) -> str:
    return "\n".join([f"{rule} ({len(places)} places):", *places])


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def sources(folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def texts() -> list[Path]:
    """Code, configuration and documentation, but not the adapters' own files."""
    files = chain.from_iterable((ROOT / folder).rglob("*") for folder in (*CODE, "docs"))
    named = [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "cluster.yaml")]
    return sorted({*named, *(path for path in files if path.suffix in TEXTS)})


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The place and the text of every docstring in a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, Definition | ast.Module) and (text := ast.get_docstring(node)):
            yield where(path, node.body[0].lineno), text


def first_word(text: str) -> str:
    found = re.match(r"\W*(\w+)", text)
    return found[1].lower() if found else ""


def too_long(path: Path) -> Iterator[str]:
    module = tree(path)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > FILE_LINES and not has_reason(ast.get_docstring(module)):
        yield f"{where(path, 1)}: the file has {lines} lines, and the limit is {FILE_LINES}"
    for node in ast.walk(module):
        if isinstance(node, Definition):
            kind, limit = (
                ("class", CLASS_LINES)
                if isinstance(node, ast.ClassDef)
                else ("function", FUNCTION_LINES)
            )
            if length(node) > limit and not has_reason(ast.get_docstring(node)):
                yield (
                    f"{where(path, node.lineno)}: the {kind} {node.name} has {length(node)} lines "
                    f"without its docstring, and the limit is {limit}"
                )


def length(node: Definition) -> int:
    """Lines from `def` or `class` to the last one, the docstring excluded."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def has_reason(docstring: str | None) -> bool:
    return docstring is not None and REASON.search(docstring) is not None


Use = tuple[int, str, str]  # line, private name, source text


def private_attributes(path: Path) -> Iterator[Use]:
    """Uses of `x._name` where `x` is not self or cls and the file itself defines no `_name`."""
    own = set(own_names(tree(path)))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not mine:
                yield node.lineno, node.attr, ast.unparse(node)


def private_imports(path: Path) -> Iterator[Use]:
    """Imports with a private part: `import torch._dynamo`, `from x import _y`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (getattr(node, "module", None) or "").split(".")
            parts = [*module, *chain.from_iterable(each.name.split(".") for each in node.names)]
            for name in filter(is_private, parts):
                yield node.lineno, name, ast.unparse(node)


def own_names(module: ast.Module) -> Iterator[str]:
    """Names of functions, variables and attributes of `self` that a file defines."""
    for node in ast.walk(module):
        if isinstance(node, Definition):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))
