# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How much a user writes for each system: lines of its snippet that are code."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

FOR_ANNOTATIONS: Final = ("__future__", "typing", "collections.abc")
SNIPPETS: Final = Path(__file__).parent / "snippets"


def snippet(system: str) -> Path:
    """The file with what a user writes in trainer and engine; settings of one system have it in common."""
    parts = system.split("-")
    paths = [SNIPPETS / f"{'_'.join(parts[:count])}.py" for count in range(len(parts), 0, -1)]
    return next((path for path in paths if path.exists()), paths[0])


def user_lines(system: str) -> int:
    """Lines of the snippet with code on them: neither empty, nor comments, nor documentation."""
    return code_lines(snippet(system).read_text())


def code_lines(source: str) -> int:
    """Lines of a module with code on them.

    Neither the heads of functions that hold parts together count, nor what is imported for annotations alone.
    """
    tree, left_out = ast.parse(source), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out |= _lines(node.lineno, node.end_lineno)
        if isinstance(node, ast.ImportFrom) and node.module in FOR_ANNOTATIONS:
            left_out |= _lines(node.lineno, node.end_lineno)
    for part in tree.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            left_out |= _lines(part.lineno, part.body[0].lineno - 1)
    lines = enumerate(source.splitlines(), start=1)
    return sum(number not in left_out and line.strip() != "" and line.strip()[0] != "#" for number, line in lines)


def _lines(first: int, last: int | None) -> set[int]:
    return set(range(first, (last or first) + 1))
