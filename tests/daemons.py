# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A real daemon for tests: a process of its own in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable
from stagingd.segment import SHARED_MEMORY

DEADLINE_S = 30.0


@dataclass
class RunningDaemon:
    """A daemon that serves; ``stop`` it, or kill it."""

    folder: Path
    prefix: str
    process: subprocess.Popen[bytes]

    @property
    def socket(self) -> Path:
        return self.folder / "control.sock"

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def status(self) -> wire.StatusReport:
        with Connection(self.socket, name="test") as connection:
            return connection.request(wire.Status(), wire.StatusReport)

    def picture(self) -> tuple[wire.StageStatus, ...]:
        """All that a refusal must not change, without ages of leases."""
        return tuple(stage.model_copy(update={"leases": ()}) for stage in self.status().stages)

    def segments(self) -> list[str]:
        return [path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(self.prefix.lstrip("/"))]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(DEADLINE_S)


def start(folder: Path, *options: str, prefix: str | None = None) -> RunningDaemon:
    """Start a daemon and wait until it serves; its segments' names start with a prefix of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = prefix or f"/stagingd-test-{uuid.uuid4().hex[:12]}-"
    command = [sys.executable, "-m", "stagingd", "serve", "--runtime-dir", str(folder), "--segment-prefix", prefix]
    with (folder / "daemon.log").open("wb") as log:
        process = subprocess.Popen([*command, "--no-lock-memory", *options], stderr=log)
    daemon = RunningDaemon(folder, prefix, process)
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            daemon.status()
        except DaemonUnreachable:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the daemon does not serve:\n{daemon.log}") from None
            time.sleep(0.02)  # a process of our own starts; there is nothing to be told by
        else:
            return daemon
