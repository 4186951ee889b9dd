# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Findings: what a check found, what it costs, and what to do, word for word."""

from __future__ import annotations

import enum

from pydantic import model_validator

from stagingd.doctor.wanted import Wanted
from stagingd.record import Record


class Level(enum.StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    """Good to know; nothing that the machine does badly."""
    WARNING = "warning"
    """It runs, slower or less safely than it could."""
    ERROR = "error"
    """It does not run."""


class Remedy(Record):
    """One way to put it right.

    Attributes:
        where: where it has to be said, or by whom.
        do: a command or a setting, word for word; it may have several lines.
    """

    where: str
    do: str


class Finding(Record):
    """What one check found.

    Attributes:
        check: the check's name.
        level: how much it matters.
        found: what is so, with figures.
        costs: what comes of it; empty where all is well.
        remedies: ways to put it right, any one of them; none where all is well.
    """

    check: str
    level: Level
    found: str
    costs: str = ""
    remedies: tuple[Remedy, ...] = ()

    @model_validator(mode="after")
    def _says_what_to_do(self) -> Finding:
        if self.level != Level.OK and not (self.costs and self.remedies):
            raise ValueError(f"the finding {self.found!r} must say what it costs and what to do")
        return self


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check=check, level=Level.OK, found=found)


class Report(Record):
    """All findings of one examination.

    Attributes:
        fit: whether nothing keeps stagingd from running.
        errors, warnings: how many there are.
        wanted: the size that the memory was held against.
        findings: in the order of the checks.
    """

    fit: bool
    errors: int
    warnings: int
    wanted: Wanted
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, wanted: Wanted, findings: tuple[Finding, ...]) -> Report:
        """Count them."""
        levels = [finding.level for finding in findings]
        errors = levels.count(Level.ERROR)
        return cls(
            fit=errors == 0, errors=errors, warnings=levels.count(Level.WARNING), wanted=wanted, findings=findings
        )

    def exit_status(self, *, strict: bool) -> int:
        """0 when fit, 1 with an error; if ``strict``, also with a warning. Notes never count."""
        return int(self.errors > 0 or (strict and self.warnings > 0))
