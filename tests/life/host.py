# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The machine with a daemon on it: it starts, is killed in the middle of a write, or hands over; segments stay."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

import numpy as np

from life.machine import Machine, Maker, Memory, Watch
from life.pictures import StagePicture, stage_pictures
from stagingd import superblock, wire
from stagingd.config import Settings
from stagingd.segment import SHARED_MEMORY, UNFINISHED
from stagingd.service import Service
from stagingd.superblock import PAGE

LEASE_S = 20.0
RETURN_S = 2.0
HEARTBEAT_S = 5.0


class Host:
    """At most one daemon at a time, and what daemons leave in shared memory.

    Args:
        heartbeats: whether the daemon serves processes that it cannot see.

    Attributes:
        late: a deadline has passed, and the daemon has not got round to it.
        left: the pictures of its stages of which its successor must find one.
    """

    def __init__(self, *, heartbeats: bool) -> None:
        self.machine = Machine()
        self.prefix = f"/stagingd-life-{os.getpid()}-{uuid.uuid4().hex[:12]}-"
        self.settings = Settings(
            runtime_dir=Path(tempfile.gettempdir()),
            segment_prefix=self.prefix,
            lock_memory=False,
            lease_s=LEASE_S,
            return_s=RETURN_S,
            heartbeat_s=HEARTBEAT_S if heartbeats else None,
        )
        self.events: list[wire.Event] = []
        self.late = False
        self.left: list[dict[str, StagePicture]] = []
        self.service: Service | None = None
        self._memories: dict[tuple[str, int], Memory] = {}

    @property
    def up(self) -> Service:
        """The daemon. There must be one."""
        assert self.service is not None
        return self.service

    def start_service(self) -> None:
        """A daemon, or the successor of the one before."""
        self.watch, self.maker = Watch(self.machine), Maker()
        service = Service(self.settings, self.machine.clock, self.events.append, self.watch, self.maker.submit)  # type: ignore[arg-type]
        service.recover()
        self.service = service
        self.late = (service.next_deadline() or self.machine.now + 1) <= self.machine.now

    def end_service(self, *, hand_over: bool = False) -> None:
        """The daemon is killed, or hands over; either way its process holds nothing any more."""
        service, self.service = self.up, None
        stages = service.stages.values()
        self.left = [stage_pictures(service)]
        segments = [stage.segment for stage in stages]
        segments += [future.result() for future in self.maker.made if not future.exception()]
        if hand_over:
            service.hand_over()
        for mapped in segments:
            if mapped is not None:
                mapped.close()

    # Shared memory

    def segments(self) -> list[Path]:
        """All that daemons have left of segments."""
        start = self.prefix.lstrip("/")
        return [path for path in SHARED_MEMORY.iterdir() if path.name.startswith(start)]

    def memory_of(self, stage: str) -> Memory:
        """A stage's segment, mapped once for all clients."""
        name = self.prefix + stage
        key = (name, (SHARED_MEMORY / name.lstrip("/")).stat().st_ino)
        if key not in self._memories:
            self._memories[key] = Memory(name)
        return self._memories[key]

    def ledgers(self) -> dict[Path, bytes]:
        """What stands in all ledgers."""
        return {path: _ledger(path) for path in self.segments() if not path.name.endswith(UNFINISHED)}

    def tear(self, before: dict[Path, bytes], landed: float) -> None:
        """Of what was written to the ledgers since, only the first part has arrived."""
        for path, old in before.items():
            new = _ledger(path)
            changed = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
            if len(changed):
                stop = int(changed[0] + landed * (changed[-1] + 1 - changed[0]))
                with path.open("r+b") as file:
                    file.seek(PAGE)
                    file.write(new[:stop] + old[stop:])

    def clean(self) -> None:
        """Nothing stays on the real machine."""
        if self.service is not None:
            self.end_service()
        for memory in self._memories.values():
            memory.close()
        for path in self.segments():
            path.unlink()


def _ledger(path: Path) -> bytes:
    with path.open("rb") as file:
        size = superblock.unpack(path.name, file.read(PAGE)).ledger_bytes
        return file.read(size)
