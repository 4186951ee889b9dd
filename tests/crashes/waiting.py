# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Waiting for a condition, with a deadline; and the limit that deaths are measured by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

LIMIT_S: Final = 2.0
"""So long after a death every survivor has its error, or goes on."""

DEADLINE_S: Final = 20.0
"""Nothing takes so long, on however busy a machine."""


def until(condition: Callable[[], object], what: str) -> None:
    """Ask again and again until the condition holds. Raises AssertionError when it does not in time."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.002)


def milliseconds_since(death: float) -> int:
    """How long ago a death was, which has to be within the limit."""
    passed = time.monotonic() - death
    assert passed <= LIMIT_S, f"{passed:.2f} s after the death"
    return round(passed * 1000)
