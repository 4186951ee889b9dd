# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The README and the pages in docs/, taken apart: their blocks, tables, and the commands in their text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "commands"

_FILE_NAME = re.compile(r"# ([\w.-]+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A block of a page: in a fence, or indented, which has no language."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """What its first line, a comment, calls the file that a reader would save it in."""
        found = _FILE_NAME.match(self.text)
        return found and found[1]

    @property
    def commands(self) -> list[str]:
        """Of a shell block, its commands: one a line, continued ones joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def pages() -> list[Path]:
    """All that people read, but what is generated from the commands' own help."""
    docs = [path for path in (ROOT / "docs").rglob("*.md") if not path.is_relative_to(GENERATED)]
    return [ROOT / "README.md", *sorted(docs), *sorted((ROOT / "examples").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in their order."""
    for token in _tokens(page.read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language, *_ = [*token.info.split(), ""]
            yield Block(page, token.map[0] + 1, language, token.content)


def inline_code(page: Path) -> Iterator[str]:
    """What stands in backticks in a page's text."""
    for token in _tokens(page.read_text()):
        yield from (part.content for part in token.children or () if part.type == "code_inline")


def links(page: Path) -> Iterator[str]:
    """Where a page's links lead."""
    for token in _tokens(page.read_text()):
        for part in token.children or ():
            if part.type == "link_open":
                yield str(part.attrs["href"])


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a page: rows of cells, the head first, as they are written."""
    found: list[list[list[str]]] = []
    inside = False
    for token in _tokens(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            inside = True
        elif token.type == "inline" and inside:
            found[-1][-1].append(token.content)
            inside = False
    return found


def _tokens(text: str) -> list[Token]:
    return MarkdownIt().enable("table").parse(text)
