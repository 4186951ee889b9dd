# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How a benchmark's command ends."""

from __future__ import annotations

import signal
import sys

import typer

from stagingd.errors import StagingError


def run_command(app: typer.Typer, name: str) -> None:
    """Run a command: a refusal is one line and exit status 1, not a traceback; what ends it lets it clean up.

    Args:
        app: the command.
        name: the module's, for the line.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or nothing would be cleaned up
    try:
        app()
    except StagingError as error:
        typer.echo(f"{name}: {error}", err=True)
        sys.exit(1)
