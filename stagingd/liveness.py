# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Liveness: learn at once that a process is gone, by a pidfd that becomes readable when it ends."""

from __future__ import annotations

import os
import select
from types import TracebackType

from stagingd.errors import PeerDied


class Process:
    """A live process. Its ``fd`` becomes readable when the process ends; close it when done."""

    def __init__(self, pid: int) -> None:
        """Watch a process. Raises PeerDied when there is none of this number."""
        self.pid = pid
        try:
            self.fd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise PeerDied(
                f"no process has pid {pid}", remedy="run client and daemon in one pid namespace", peer=str(pid)
            ) from error

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        watch = select.poll()  # unlike select(), for descriptors of any number
        watch.register(self.fd, select.POLLIN)
        return bool(watch.poll(0))

    def close(self) -> None:
        """Stop watching."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
