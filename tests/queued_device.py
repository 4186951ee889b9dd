# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A device with two queues that runs what is queued as late, and in as odd an order, as the marks allow."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from move_sets import aligned
from stagingd_vllm.copy_engine import Treat
from stagingd_vllm.crossings import Copy
from stagingd_vllm.move_reference import run_moves
from stagingd_vllm.moves import Move

RATE = 50e9
"""Bytes a second that its copies cross at, by a clock that only copies move."""


class CopyRefused(Exception):
    """The copy of some bytes is refused."""


@dataclass(frozen=True)
class QueuedMark:
    """A point in a queue."""

    queue: QueuedQueue
    place: int

    @property
    def reached(self) -> bool:
        return self.queue.done >= self.place

    def wait(self) -> None:
        self.queue.device.run_until(lambda: self.reached)

    def seconds_since(self, earlier: QueuedMark) -> float:
        assert self.reached
        assert earlier.reached
        return self.queue.times[self.place] - earlier.queue.times[earlier.place]


class QueuedQueue:
    """What has been queued; ``times`` says when each of it was done."""

    def __init__(self, device: QueuedDevice) -> None:
        self.device = device
        self.done = 0
        self.times = [0.0]
        self._work: list[Callable[[], bool]] = []

    def mark(self) -> QueuedMark:
        return QueuedMark(self, len(self._work))

    def after(self, mark: QueuedMark) -> None:
        self._work.append(lambda: mark.reached)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What torch computes on a CPU is done at once; ``QueuedDevice.compute`` is queued."""
        before, self.device.computes_on = self.device.computes_on, self
        yield
        self.device.computes_on = before

    def copy(self, copy: Copy, slot: int, buffer: int) -> None:
        if copy.bytes == self.device.refused:
            raise CopyRefused

        def cross() -> bool:
            for row in range(copy.rows):
                ctypes.memmove(
                    buffer + copy.place + row * copy.width, slot + copy.source + row * copy.pitch, copy.width
                )
            self.device.now += copy.bytes / RATE
            return True

        self._work.append(cross)

    def when(self, condition: Callable[[], bool]) -> None:
        """Work that lasts until something holds."""
        self._work.append(condition)

    def work(self, what: Callable[[], None]) -> None:
        self._work.append(lambda: what() is None)

    @property
    def waiting(self) -> bool:
        return self.done < len(self._work)

    def try_next(self) -> bool:
        """Do what is next, unless it has to wait."""
        if not self.waiting or not self._work[self.done]():
            return False
        self.done += 1
        self.times.append(self.device.now)
        return True


class QueuedDevice:
    """In host memory; a seed gives the order."""

    def __init__(self, seed: int = 0) -> None:
        self._order = random.Random(seed)
        self._memory: list[torch.Tensor] = []
        self.now = 0.0
        self.refused = -1
        self.copying, self.computing = QueuedQueue(self), QueuedQueue(self)
        self.computes_on = self.computing

    def compute(self, what: Callable[[], None]) -> None:
        """Queue it where the thread's computations go."""
        self.computes_on.work(what)

    def current(self) -> QueuedQueue:
        return self.computing

    def buffer(self, size: int) -> int:
        self._memory.append(aligned(size))
        return self._memory[-1].data_ptr()

    def treating(self, moves: Sequence[Move], *, landed: bool, beside: bool) -> Treat:
        del landed, beside
        end = max(move.source_end for move in moves)

        def treat(address: int) -> None:
            memory = (ctypes.c_char * end).from_address(address)
            self.computing.work(lambda: run_moves(moves, torch.frombuffer(memory, dtype=torch.uint8)))

        return treat

    def run_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            queues = [self.copying, self.computing]
            self._order.shuffle(queues)
            assert any(queue.try_next() for queue in queues), "each queue waits for the other"

    def synchronize(self) -> None:
        """Wait until what computes is done."""
        self.run_until(lambda: not self.computing.waiting)
