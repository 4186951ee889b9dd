# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A device for tests: its queues run as late, and in as odd an order, as the marks between them allow.

So a mark that somebody forgot to wait for shows on any machine, and every time.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from stagingd_client.copies import Copy
from stagingd_client.moments import shard_moments
from stagingd_client.quantize import quantized
from stagingd_client.strips import Job, QuantizingWork, Work

from stagingd.boxes import Box
from stagingd.moments import BLOCK, Grid, cells_of


@dataclass(frozen=True)
class LazyMark:
    """The point before a queue's operation of this number."""

    queue: LazyQueue
    position: int

    @property
    def passed(self) -> bool:
        return self.queue.done >= self.position

    @property
    def reached(self) -> bool:
        """Looking takes time, in which the device does a little."""
        self.queue.device.work()
        return self.passed


@dataclass
class LazyQueue:
    """Operations, of which the first ``done`` have run."""

    device: LazyDevice
    name: str
    operations: list[Callable[[], None] | LazyMark] = field(default_factory=list)
    done: int = 0

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def mark(self) -> LazyMark:
        return LazyMark(self, len(self.operations))

    def after(self, mark: LazyMark) -> None:  # type: ignore[override]
        self.operations.append(mark)

    def run(self, work: Callable[[], None]) -> None:
        self.operations.append(work)

    def copy(self, copy: Copy, slot: int, scratch: int) -> None:
        self.operations.append(lambda: _memmove(copy, slot, scratch))

    @property
    def ready(self) -> bool:
        if self.done == len(self.operations):
            return False
        following = self.operations[self.done]
        return not isinstance(following, LazyMark) or following.passed

    def step(self) -> None:
        following = self.operations[self.done]
        if not isinstance(following, LazyMark):
            following()
        self.done += 1


def _memmove(copy: Copy, slot: int, scratch: int) -> None:
    for run in range(copy.height):
        target = slot + copy.target + run * copy.target_pitch
        ctypes.memmove(target, scratch + copy.source + run * copy.source_pitch, copy.width)


class LazyDevice:
    """Three queues.

    Args:
        order: decides which queue goes on.
        hurry: the name of a queue that always goes on when it can: "trainer" shows what nobody fences.
        linger: the name of a queue that only goes on when no other can: "trainer" shows what is read too early.
    """

    def __init__(self, order: random.Random, hurry: str | None = None, linger: str | None = None) -> None:
        self.trainer, self.casting, self.copying = (LazyQueue(self, n) for n in ("trainer", "casting", "copying"))
        self._order = order
        self._hurry, self._linger = hurry, linger
        self.memory_bytes = 0

    def at_work(self) -> AbstractContextManager[None]:
        return nullcontext()

    def current(self) -> LazyQueue:
        return self.trainer

    def memory(self, size: int) -> torch.Tensor:
        self.memory_bytes += size
        return torch.full((size,), 0xA5, dtype=torch.uint8)  # what was there before, never zeros

    def host_memory(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like)

    def work(self, steps: int = 1) -> None:
        """Do a few operations."""
        for _ in range(steps):
            ready = [queue for queue in (self.trainer, self.casting, self.copying) if queue.ready]
            if not ready:
                return
            hurried = [queue for queue in ready if queue.name == self._hurry]
            patient = [queue for queue in ready if queue.name != self._linger]
            self._order.choice(hurried or patient or ready).step()

    def finish(self) -> None:
        """Do everything that can be done."""
        while any(queue.ready for queue in (self.trainer, self.casting, self.copying)):
            self.work()

    def cast(self, work: Work) -> None:
        cast_in_torch(work)

    def quantize(self, work: QuantizingWork) -> None:
        quantize_in_torch(work)


def cast_in_torch(work: Work) -> None:
    """The reference of the kernel: reads the same tables, computes by ``stagingd_client.moments``."""
    for strip in range(work.first_strip, work.first_strip + work.count):
        number, block_row = work.strips[strip].tolist()
        job = {column: int(work.jobs[number, column]) for column in Job}
        first = max(0, block_row * BLOCK - job[Job.ROWS_LEFT])
        end = min(job[Job.ROWS], (block_row + 1) * BLOCK - job[Job.ROWS_LEFT])
        staged = _rows(job, first, end, work.kind.source).to(work.kind.staged)
        if work.kind.packed:
            target = job[Job.TARGET] + first * job[Job.COLUMNS]
            work.scratch[target : target + staged.numel()] = staged.reshape(-1)
        box = Box((job[Job.ROWS_LEFT] + first, job[Job.COLUMNS_LEFT]), tuple(staged.shape))
        found = shard_moments(staged, box, list(Grid))
        places = {Grid.TENSOR: (work.partials, strip)}
        if work.with_rows:
            places[Grid.ROW] = work.cells, job[Job.ROW_CELL] + first
        if work.with_blocks:
            blocks = -(-(job[Job.COLUMNS_LEFT] + job[Job.COLUMNS]) // BLOCK)
            places[Grid.BLOCK] = work.cells, job[Job.BLOCK_CELL] + block_row * blocks
        for grid, (table, at) in places.items():
            moments = found[grid]
            here = slice(at, at + moments.count.numel())
            for values, row in zip((moments.mean, moments.m2, moments.amax), table, strict=False):
                row[here] = values.float()
            table[3].view(torch.int32)[here] = moments.nonfinite.int()


def quantize_in_torch(work: QuantizingWork) -> None:
    """The reference of the kernel that quantizes: reads the same tables, computes by ``stagingd_client.quantize``."""
    for strip in range(work.first_strip, work.first_strip + work.count):
        number, block_row = work.strips[strip].tolist()
        job = {column: int(work.jobs[number, column]) for column in Job}
        first = max(0, block_row * BLOCK - job[Job.ROWS_LEFT])
        end = min(job[Job.ROWS], (block_row + 1) * BLOCK - job[Job.ROWS_LEFT])
        values = _rows(job, first, end, work.kind.source).to(work.kind.staged)
        box = Box((job[Job.ROWS_LEFT] + first, job[Job.COLUMNS_LEFT]), tuple(values.shape))
        grid, cell = work.stage_format.grid, job[Job.ROW_CELL]
        cells = cells_of(grid, box.ends, box)
        if grid is Grid.ROW:
            cell += first
        elif grid is Grid.BLOCK:
            cell += block_row * cells.lengths[1]
        scales = work.scales[cell : cell + cells.volume].view(cells.lengths)
        made = quantized(values, scales, work.stage_format, box, box.ends).view(torch.uint8)
        target = job[Job.TARGET] + first * job[Job.COLUMNS]
        work.scratch[target : target + made.numel()] = made.reshape(-1)


def _rows(job: dict[Job, int], first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """The elements of some rows, read from the address in the table."""
    item = torch.empty((), dtype=dtype).element_size()
    lines = []
    for row in range(job[Job.FIRST_ROW] + first, job[Job.FIRST_ROW] + end):
        start = job[Job.ADDRESS] + _row_offset(job, row) * item
        span = (job[Job.COLUMNS] - 1) * job[Job.COLUMN_STRIDE] + 1
        raw = (ctypes.c_uint8 * (span * item)).from_address(start)
        line = torch.frombuffer(raw, dtype=dtype)[:: job[Job.COLUMN_STRIDE] or 1]
        lines.append(line.expand(job[Job.COLUMNS]).clone())
    return torch.stack(lines)


def _row_offset(job: dict[Job, int], row: int) -> int:
    offset = 0
    for size, stride in _levels(job):
        row, index = divmod(row, size)
        offset += index * stride
    return offset + row * job[Job.STRIDE_0]


def _levels(job: dict[Job, int]) -> Iterator[tuple[int, int]]:
    yield job[Job.SIZE_3], job[Job.STRIDE_3]
    yield job[Job.SIZE_2], job[Job.STRIDE_2]
    yield job[Job.SIZE_1], job[Job.STRIDE_1]
