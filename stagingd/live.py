# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A screen of stages that is drawn again and again, until the one who looks at it presses q."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from stagingd.errors import StagingError
from stagingd.screen import FittedScreen
from stagingd.seen import Seen


class NoTerminal(StagingError):
    """What is to be looked at cannot be drawn where the output goes."""

    code = "no_terminal"


def show(look: Callable[[], Seen], interval_s: float, console: Console) -> None:
    """Look and draw until q or Ctrl-C is pressed.

    Args:
        look: asks the daemon.
        interval_s: seconds from one look to the next.
        console: where it is drawn.

    Raises:
        NoTerminal: the output is no terminal.
        StagingError: what ``look`` raises.
    """
    if not console.is_terminal:
        raise NoTerminal(
            "the output is no terminal, and cannot be drawn anew", remedy="use stagingd status, perhaps with --json"
        )
    first = FittedScreen(look())  # before the screen is cleared: a refusal shall be seen
    try:
        with _keys() as keys, Live(first, console=console, screen=True, auto_refresh=False) as live:
            live.refresh()
            while not _quit_within(keys, interval_s):
                live.update(FittedScreen(look()), refresh=True)
    except KeyboardInterrupt:
        return


@contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal's descriptor, of which each key can be read at once; None where the input is none."""
    if not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _quit_within(keys: int | None, seconds: float) -> bool:
    """Wait so long. Returns at once, and True, when q is pressed or the terminal is gone."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select([] if keys is None else [keys], [], [], left)
        if ready and keys is not None and os.read(keys, 1) in (b"q", b"Q", b""):
            return True
    return False
