"""README.md and docs/*.md as the tests read them: code blocks, inline code, tables, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))

NEEDS_A_FLEET = "<!-- test: needs a running fleet -->"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block. `marker`: the HTML comment on the line before it, or an empty text."""

    page: Path
    line: int
    language: str
    text: str
    marker: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str | None = None) -> Iterator[Block]:
    text = read(page)
    for found in _FENCE.finditer(text):
        before = text[: found.start()].rstrip("\n").rpartition("\n")[2]
        if language in (None, found[1]):
            yield Block(
                page=page,
                line=text.count("\n", 0, found.start()) + 1,
                language=found[1],
                text=found[2],
                marker=before if before.startswith("<!--") else "",
            )


def all_blocks(language: str | None = None) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, language)]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Targets of all links to files and headings of this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def between(page: Path, mark: str) -> str:
    """The text from the comment that begins with `mark` to the next comment."""
    found = re.search(rf"<!-- {re.escape(mark)}.*?-->\n(.*?)\n<!-- end of", read(page), re.DOTALL)
    assert found is not None, f"{page.name} has no <!-- {mark} ... --> with an end"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = [i for i, row in enumerate(cells) if set("".join(row)) <= set("- ")]
    return [row for i, row in enumerate(cells) if i not in heads and i + 1 not in heads]


def section(page: Path, heading: str) -> str:
    """The text under a heading of the second level."""
    return prose(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and variable assignments."""
    waiting = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        waiting += line + "\n"
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # inside of quotes
            continue
        waiting = ""
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words
    assert not waiting, f"{block}: a quote is not closed"
