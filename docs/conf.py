# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Sphinx: pages in Markdown, the API reference from docstrings, the commands' pages and the man page from typer."""

from __future__ import annotations

import html
import tomllib
from pathlib import Path
from typing import Any, Final

import typer.cli
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from typer.testing import CliRunner

HERE = Path(__file__).parent

COMMANDS: Final = {
    "stagingd": ("stagingd.cli", "stagingd"),
    "plan_command": ("stagingd_vllm.plan_command", "python -m stagingd_vllm.plan_command"),
    "follow_command": ("stagingd_vllm.follow_command", "python -m stagingd_vllm.follow_command"),
}
"""Pages of commands: the module of each, and what people type."""

project = "stagingd"
copyright = "2026 The stagingd authors"  # noqa: A001 - Sphinx names it so
author = "The stagingd authors"
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_mock_imports = ["vllm", "torchtitan"]  # seconds to import, for signatures that name nothing of them
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True

html_theme = "alabaster"
html_theme_options = {"description": "Model weights from trainers to engines", "page_width": "1080px"}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}

man_pages = [("commands/stagingd", "stagingd", "stage model weights in shared host memory", [author], 1)]
man_show_urls = False


def command_page(module: str, typed: str) -> str:
    """What ``typer MODULE utils docs`` writes of a command."""
    shown = CliRunner().invoke(typer.cli.app, [module, "utils", "docs", "--name", typed], catch_exceptions=False)
    if shown.exit_code != 0:
        raise RuntimeError(f"typer cannot describe {module}: {shown.output}")
    return html.unescape(shown.output)


def read_sections(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Args, Returns and Raises. Of an attribute napoleon would take what stands before a colon for its type."""
    if what not in ("attribute", "property", "data"):
        lines[:] = GoogleDocstring(list(lines), Config(), app, what, name, thing, options).lines()


def plain_record(_app: Sphinx, _what: str, _name: str, thing: Any, *_: Any) -> tuple[str, None] | None:
    """Of a record the fields say more than the signature that pydantic makes."""
    return ("", None) if isinstance(thing, type) and issubclass(thing, BaseModel) else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", read_sections)
    app.connect("autodoc-process-signature", plain_record)


(HERE / "commands").mkdir(exist_ok=True)
for page, command in COMMANDS.items():
    (HERE / "commands" / f"{page}.md").write_text(command_page(*command))
