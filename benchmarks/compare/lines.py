# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How much a user writes for each system: lines of its snippet that are code."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

SNIPPETS: Final = Path(__file__).parent / "snippets"


def snippet(system: str) -> Path:
    """The file with what a user writes in trainer and engine."""
    return SNIPPETS / f"{system.replace('-', '_')}.py"


def user_lines(system: str) -> int:
    """Lines of the snippet with code on them: neither empty, nor comments, nor documentation."""
    return code_lines(snippet(system).read_text())


def code_lines(source: str) -> int:
    """Lines of a module with code on them. Functions that only hold it together do not count, their bodies do."""
    counted: set[int] = set()
    for node in ast.parse(source).body:
        body = node.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else [node]
        for statement in body:
            if not _is_text(statement):
                counted.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines = source.splitlines()
    return sum(1 for number in counted if (line := lines[number - 1].strip()) and not line.startswith("#"))


def _is_text(statement: ast.stmt) -> bool:
    """Whether it is documentation, or the import that only has annotations read late."""
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        return True
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
