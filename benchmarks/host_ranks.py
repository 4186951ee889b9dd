# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The processes of ``benchmarks.host``: writers that flush and readers that read, all in step."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path

import posix_ipc
import torch
from stagingd_client import LocalShard, Stage
from stagingd_client.moments import shard_moments
from stagingd_vllm.reader import Reader

from benchmarks.host_case import (
    DEADLINE_S,
    GRIDS,
    READERS_STEPS,
    STAGES,
    WRITERS_STEPS,
    BenchmarkFailed,
    Case,
    Spans,
    Step,
)
from stagingd.moments import ALL_GRIDS, Grid


@dataclass(frozen=True)
class Place:
    """A process's part in a case: who it is, and what it shares with the others.

    Attributes:
        socket: the daemon's control socket.
        mapping: POSIX name of the shared memory that the ceiling copies into and out of.
        barrier: all processes wait at it before every step.
        rounds: how many rounds have ended; the first reader counts.
        answers: where the spans go in the end.
    """

    case: Case
    rank: int
    socket: Path
    mapping: str
    barrier: Barrier
    rounds: Synchronized[int]
    answers: Connection


class Memory:
    """A rank's elements in private memory, in one piece, and the rank's part of the shared mapping."""

    def __init__(self, place: Place) -> None:
        case, rank = place.case, place.rank
        count = case.elements(rank)
        self.values = torch.ones(count, dtype=torch.bfloat16)  # written to, so that its pages are there
        self.boxes = case.boxes(rank)
        parts = torch.split(self.values, [box.volume for box in self.boxes.values()])
        self.parts = {n: part.view(b.lengths) for (n, b), part in zip(self.boxes.items(), parts, strict=True)}
        shared = posix_ipc.SharedMemory(place.mapping)
        mapping = mmap.mmap(shared.fd, case.bytes)
        shared.close_fd()
        first = sum(case.elements(before) for before in range(rank))
        self._shared = torch.frombuffer(mapping, dtype=torch.bfloat16)[first : first + count]

    def store(self, _version: int) -> None:
        """One memcpy from private to shared memory. Not torch's copy: libc's is the faster one."""
        ctypes.memmove(self._shared.data_ptr(), self.values.data_ptr(), self.values.nbytes)

    def load(self, _version: int) -> None:
        """One memcpy from shared to private memory."""
        ctypes.memmove(self.values.data_ptr(), self._shared.data_ptr(), self.values.nbytes)

    @property
    def equal(self) -> bool:
        """Whether private and shared bytes are the same."""
        return torch.equal(self.values.view(torch.int16), self._shared.view(torch.int16))


class Writer:
    """A trainer rank, with a stage for each choice of grids."""

    title = "writer"

    def __init__(self, place: Place, cleanup: ExitStack) -> None:
        self._memory = Memory(place)
        self._random = torch.Generator().manual_seed(place.rank)
        shapes = place.case.shapes
        self._shards = {
            name: LocalShard(part, shapes[name], self._memory.boxes[name].offsets)
            for name, part in self._memory.parts.items()
        }
        self.steps: dict[Step, Callable[[int], None]] = {
            Step.MEMCPY_IN: self._memory.store,
            Step.MOMENTS: self._take_moments,
        }
        for step, grids in GRIDS.items():
            stage = cleanup.enter_context(self._open(place, STAGES[step], grids))
            stage.declare(self._shards)
            self.steps[step] = functools.partial(self._flush, stage)

    @staticmethod
    def _open(place: Place, name: str, grids: tuple[Grid, ...]) -> Stage:
        ranks = place.case.ranks
        return Stage.open(name, rank=place.rank, ranks=ranks, socket=place.socket, grids=grids, timeout_s=DEADLINE_S)

    def prepare(self) -> None:
        """New weights, as after an optimizer step."""
        self._memory.values.normal_(std=0.02, generator=self._random)

    def forget(self) -> None:
        """Writers have nothing to compare."""

    def check(self, step: Step) -> None:
        """Writers have nothing to compare."""

    def _flush(self, stage: Stage, version: int) -> None:
        stage.begin(version)
        for name, shard in self._shards.items():
            stage.put(name, shard)
        stage.commit().wait()

    def _take_moments(self, _version: int) -> None:
        for name, part in self._memory.parts.items():
            if part.numel():
                shard_moments(part, self._memory.boxes[name], ALL_GRIDS)


class Copier:
    """A reader rank: copies its rows of every tensor into private memory."""

    title = "reader"

    def __init__(self, place: Place, cleanup: ExitStack) -> None:
        self._memory = Memory(place)
        self.steps: dict[Step, Callable[[int], None]] = {Step.MEMCPY_OUT: self._memory.load}
        for step in (Step.READ, Step.READ_TENSOR_GRID):
            reader = cleanup.enter_context(self._attach(place, STAGES[step]))
            self.steps[step] = functools.partial(self._read, reader)

    @staticmethod
    def _attach(place: Place, stage: str) -> Reader:
        ranks = place.case.ranks
        return Reader.attach(
            stage, engine="bench", rank=place.rank, ranks=ranks, socket=place.socket, timeout_s=DEADLINE_S
        )

    def prepare(self) -> None:
        """Readers make nothing."""

    def forget(self) -> None:
        """Wipe what was read before, so that only this step's own bytes can pass the check."""
        self._memory.values.zero_()

    def check(self, step: Step) -> None:
        """Compare with what the writers copied, without stagingd, from the memory that they put."""
        if not self._memory.equal:
            raise BenchmarkFailed(f"{step} gave other bytes than were put", remedy="report this", step=step.value)

    def _read(self, reader: Reader, version: int) -> None:
        with reader.lease(version=version, timeout_s=DEADLINE_S) as lease:
            for name, box in self._memory.boxes.items():
                self._memory.parts[name].copy_(lease.read(name, box))


Role = type[Writer] | type[Copier]
ROLES: tuple[Role, ...] = (Writer, Copier)


def order(version: int) -> Iterator[Step]:
    """Writers first, then readers; every other round backwards, so that no step always finds warm caches."""
    way = 1 if version % 2 else -1
    return itertools.chain(WRITERS_STEPS[::way], READERS_STEPS[::way])


def work(role: Role, place: Place) -> None:
    """A process: all rounds in step with the others."""
    torch.set_num_threads(1)
    spans: Spans = defaultdict(list)
    with ExitStack() as cleanup:
        member = role(place, cleanup)
        for version in place.case.versions:
            member.prepare()
            for step in order(version):
                take(member, step, version, place, spans)
            place.barrier.wait(DEADLINE_S)  # nobody changes anything while others still read or check
            if role is Copier and place.rank == 0:
                place.rounds.value = version
    place.answers.send(dict(spans))


def take(member: Writer | Copier, step: Step, version: int, place: Place, spans: Spans) -> None:
    """One step of one process: only what it does itself is timed."""
    action, check = member.steps.get(step), not place.case.timed(version)
    if action is not None and check:
        member.forget()
    place.barrier.wait(DEADLINE_S)
    if action is None:
        return
    start = time.perf_counter()
    action(version)
    spans[step].append((start, time.perf_counter()))
    if check:
        member.check(step)
