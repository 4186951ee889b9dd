# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The README and the pages in docs/, taken apart: their fenced blocks and tables."""

from __future__ import annotations

from markdown_it import MarkdownIt


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a page: rows of cells, the head first, as they are written."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 2:
            found[-1][-1].append(token.content)
    return found
