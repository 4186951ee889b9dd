# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The play: two trainer ranks and an engine of two, in this process, do every step of the protocol once, in order.

It does not know of any death. Where the daemon is killed and restarted, it has to come to its end all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

from stagingd_client import Publication, Stage
from stagingd_vllm import Reader

from crashes import model
from crashes.scene import TIMEOUT_S, attach, declare, observer, open_stage
from crashes.waiting import until
from stagingd import wire

STAGE: Final = "policy"
SECOND: Final = "second"
LAST_VERSION: Final = 4


class Play:
    """Made once the daemon serves; leave it as a context.

    Args:
        socket: the daemon's.
        under_way: called when version 2 is: rank 0 has committed it and waits for rank 1.
        passage: called when the engine's rank 0 reads version 1 while version 2 is under way.

    Attributes:
        socket: the daemon's.
        done: what was done, and when, on the monotonic clock.
        publications: what was committed and is not known to be sealed.
    """

    def __init__(self, socket: Path, under_way: Callable[[], None], passage: model.Passage) -> None:
        self.done: list[tuple[str, float]] = []
        self.publications: list[Publication] = []
        self.socket = socket
        self._under_way = under_way
        self._passage = passage
        self._clients = ExitStack()
        self._observer = self._clients.enter_context(observer(socket))

    def __enter__(self) -> Play:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._clients.__exit__(kind, error, at)

    def run(self) -> None:
        """All of it."""
        for act in (
            self._found,
            self._trainer_comes_back,
            self._fill,
            self._found_second,
            self._read_front,
            self._worker_comes_back,
            self._commit,
            self._flip_by_lease,
            self._flip_by_begin,
        ):
            act()
            self.done.append((act.__name__.strip("_").replace("_", " "), time.monotonic()))

    def _status(self) -> wire.StageStatus:
        """Of the stage; by a connection that lasts, because each goodbye is counted."""
        report = self._observer.request(wire.Status(), wire.StatusReport)
        return next(stage for stage in report.stages if stage.stage == STAGE)

    def _trainer(self, rank: int) -> Stage:
        self._status()  # a client that lives waits for the daemon; one that is only being made does not
        return self._clients.enter_context(open_stage(STAGE, self.socket, rank))

    def _worker(self, rank: int) -> Reader:
        self._status()
        return self._clients.enter_context(attach(STAGE, self.socket, rank=rank, ranks=2))

    def _found(self) -> None:
        """Version 1 becomes the front."""
        self._zero = self._clients.enter_context(open_stage(STAGE, self.socket, 0))
        self._one = self._clients.enter_context(open_stage(STAGE, self.socket, 1))
        declare(self._zero, self._one)
        self._publish(1)
        self._workers = [self._worker(0), self._worker(1)]
        self._read(1, newer_than=0)

    def _read(self, version: int, *, newer_than: int | None = None, passage: model.Passage = lambda *_: None) -> None:
        """Both ranks of the engine lease a version, read it, and release it."""
        exactly = version if newer_than is None else None
        leases = [worker.lease(version=exactly, newer_than=newer_than, timeout_s=TIMEOUT_S) for worker in self._workers]
        for lease in leases:
            assert model.check(lease, passage) == version
        for lease in leases:
            lease.release()

    def _trainer_comes_back(self) -> None:
        """Rank 1 leaves and comes back; rank 0 begins version 2 meanwhile."""
        self._one.close()
        self._fill_by(self._zero)
        self._one = self._trainer(1)
        declare(self._one)

    def _fill(self) -> None:
        self._fill_by(self._one)

    def _fill_by(self, stage: Stage) -> None:
        model.fill(stage, 2)
        stage.fence()

    def _found_second(self) -> None:
        self._status()
        second = self._clients.enter_context(open_stage(SECOND, self.socket, 0, ranks=1))
        declare(second)

    def _read_front(self) -> None:
        self._read(1, passage=self._passage)

    def _worker_comes_back(self) -> None:
        self._workers[1].close()
        self._workers[1] = self._worker(1)

    def _commit(self) -> None:
        """Rank 0 commits first; the commit of rank 1 seals the version."""
        self.publications.append(self._zero.commit())
        until(lambda: any(slot.committed_ranks == (0,) for slot in self._status().slots), "rank 0 to have committed")
        self._under_way()
        self.publications.append(self._one.commit())
        self._await_sealed()

    def _await_sealed(self) -> None:
        for publication in self.publications:
            publication.wait()
        self.publications.clear()

    def _publish(self, version: int) -> None:
        for stage in (self._zero, self._one):
            model.fill(stage, version)
            self.publications.append(stage.commit())
        self._await_sealed()

    def _flip_by_lease(self) -> None:
        self._read(2, newer_than=1)

    def _flip_by_begin(self) -> None:
        """Version 3 is not read; it becomes the front when version 4 begins."""
        self._publish(3)
        self._publish(LAST_VERSION)
        self._read(LAST_VERSION, newer_than=3)
