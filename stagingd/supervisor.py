# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the daemon tells the service manager that started it: ready, alive, stopping.

The protocol is systemd's, documented as stable and meant to be implemented directly: see sd_notify(3) and
sd_watchdog_enabled(3). A message is one datagram of ``NAME=value`` lines to the socket in ``NOTIFY_SOCKET``.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import Final

import structlog

from stagingd.errors import StagingError

log = structlog.get_logger()

MAX_STATUS_CHARACTERS: Final = 512
"""systemd drops a whole message of more than 4096 bytes; a character may have four."""

INFINITE: Final = 2**64 - 1
"""systemd's way to write that there is no limit; as the period of a watchdog it means nothing."""


class BadSetting(StagingError):
    """The service manager's environment says something that cannot be meant."""

    code = "bad_setting"


class Supervisor:
    """The service manager, or nobody where the daemon was not started by one.

    Telling it something never blocks and never fails: a manager that does not listen is logged, once.

    Attributes:
        watchdog_s: ``alive`` has to be called at least once in so many seconds; None where nobody watches.
    """

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        self.watchdog_s = watchdog_s
        self._address = "\0" + address[1:] if address is not None and address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if address else None
        self._unsent: dict[str, str] = {}
        self._complained = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Supervisor:
        """The supervisor that ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` name, if they do.

        Raises:
            BadSetting: one of the three cannot be understood.
        """
        address = environment.get("NOTIFY_SOCKET")
        if not address:
            return cls(None, None)
        if address[0] not in "/@":
            raise _bad("NOTIFY_SOCKET", address, "neither an absolute path nor an abstract name")
        period_us = _number(environment, "WATCHDOG_USEC")
        watched_pid = _number(environment, "WATCHDOG_PID")
        if period_us is None or watched_pid not in (None, os.getpid()):
            return cls(address, None)
        return cls(address, period_us / 2 / 1_000_000)  # half, so that one late call is not the end

    def ready(self, status: str) -> None:
        """The daemon serves from now on."""
        self._tell(READY="1", STATUS=_line(status))

    def alive(self) -> None:
        """The event loop still turns."""
        self._tell(WATCHDOG="1")

    def status(self, text: str) -> None:
        """One line for people, in ``systemctl status``."""
        self._tell(STATUS=_line(text))

    def stopping(self) -> None:
        """The daemon has begun to shut down."""
        self._tell(STOPPING="1")

    def _tell(self, **said: str) -> None:
        if self._socket is None or self._address is None:
            return
        self._unsent |= said  # what was refused goes with the next message: a lost READY would end the daemon
        message = "\n".join(f"{name}={value}" for name, value in self._unsent.items())
        try:
            self._socket.sendto(message.encode(errors="replace"), self._address)
        except OSError as error:
            if not self._complained:
                log.warning("supervisor_unreachable", socket=self._address.replace("\0", "@"), reason=str(error))
            self._complained = True
        else:
            self._unsent.clear()


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,20}", text) or not 0 < int(text) < INFINITE:
        raise _bad(name, text, "not a positive whole number")
    return int(text)


def _bad(name: str, value: str, why: str) -> BadSetting:
    return BadSetting(f"{name} is {value!r}, {why}", remedy=f"unset {name}, or start the daemon by systemd")


def _line(text: str) -> str:
    """The text as one line, or a stage's name could end it and begin another message."""
    return " ".join(text.split())[:MAX_STATUS_CHARACTERS]
