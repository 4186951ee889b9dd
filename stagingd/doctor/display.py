# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Findings for people, and progress while they wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from stagingd.doctor.examination import Say
from stagingd.doctor.finding import Finding, Level, Report

_COLOURS: Final = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.ERROR: "red"}
_INDENT: Final = 9


@contextmanager
def progress(console: Console) -> Iterator[Say]:
    """A line that says what is being looked at, and since when; it goes when all is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what: bar.update(task, description=what)


def show(report: Report, console: Console) -> None:
    """Print all findings, and what they come to."""
    for finding in report.findings:
        _show(finding, console)
    console.print(Text(_verdict(report), style="bold"), soft_wrap=True)


def _show(finding: Finding, console: Console) -> None:
    level = Text(f"{finding.level:{_INDENT}}", style=_COLOURS[finding.level])
    console.print(level + Text(f"{finding.check}: ", style="bold") + Text(finding.found), soft_wrap=True)
    if finding.costs:
        _line(console, "costs", finding.costs)
    for remedy in finding.remedies:
        first, *more = remedy.do.splitlines()
        _line(console, "do", f"{remedy.where}: ", first)
        for line in more:
            _line(console, "", " " * len(f"{remedy.where}: "), line)


def _line(console: Console, name: str, text: str, command: str = "") -> None:
    start = Text(" " * _INDENT + f"{name:6}", style="dim")
    console.print(start + Text(text) + Text(command, style="bold"), soft_wrap=True)


def _verdict(report: Report) -> str:
    verdict = "fit to run" if report.fit else "not fit to run"
    return f"{verdict}: {_named(report, Level.ERROR)}; {_named(report, Level.WARNING)}"


def _named(report: Report, level: Level) -> str:
    checks = [finding.check for finding in report.findings if finding.level is level]
    plural = "" if len(checks) == 1 else "s"
    return f"{len(checks)} {level}{plural} ({', '.join(checks)})" if checks else f"no {level}s"
