# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The machine that daemons and clients live on: its clock, its processes, and shared memory that tells who wrote it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagingd import segment
from stagingd.boxes import Box, whole
from stagingd.catalog import Catalog, OwnedBox, TensorDeclaration
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import NotEnoughMemory, PeerDied, StagingError
from stagingd.moments import StoredMoments, cells_of, stored_bytes
from stagingd.progress import Needs
from stagingd.segment import Segment

Array = npt.NDArray[np.generic]


@dataclass(eq=False)
class Process:
    """A client's process. The daemon does not see the number of a hidden one."""

    pid: int
    started: int
    hidden: bool
    alive: bool = True


class Machine:
    """The clock and the process table."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.running: dict[int, Process] = {}
        self.numbers: list[int] = []
        self._starts = itertools.count(1)

    def clock(self) -> float:
        return self.now

    def start(self, *, hidden: bool, old_number: bool) -> Process:
        """A new process; with the number of one that has ended if so wished and there is any."""
        free = [pid for pid in self.numbers if pid not in self.running]
        pid = free[-1] if old_number and free else 100 + len(self.numbers)
        if pid not in self.numbers:
            self.numbers.append(pid)
        process = self.running[pid] = Process(pid, next(self._starts), hidden)
        return process

    def end(self, process: Process) -> None:
        process.alive = False
        self.running.pop(process.pid, None)


class Watch:
    """Stands for ``Processes``: whom one daemon watches, and how often it said so."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.held: dict[int, tuple[Process, int]] = {}

    def hold(self, pid: int) -> int:
        process, holders = self.held.get(pid, (self._machine.running.get(pid), 0))
        if process is None or not process.alive:
            raise PeerDied(f"no process has pid {pid}", remedy="start it again", peer=str(pid))
        self.held[pid] = (process, holders + 1)
        return process.started

    def release(self, pid: int) -> None:
        process, holders = self.held.pop(pid)
        if holders > 1:
            self.held[pid] = (process, holders - 1)

    @property
    def ended(self) -> list[int]:
        """The numbers of those whose end the daemon has yet to see."""
        return [pid for pid, (process, _) in self.held.items() if not process.alive]


class Maker:
    """Makes memory when it is told to, as the daemon's background thread does."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Future[Segment], Callable[[], Segment]]] = []
        self.made: list[Future[Segment]] = []

    def submit(self, work: Callable[[], Segment]) -> Future[Segment]:
        future: Future[Segment] = Future()
        self._waiting.append((future, work))
        return future

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def make(self, *, room: bool = True) -> None:
        """Finish the first of what is to be made, or find that there is no room for it."""
        future, work = self._waiting.pop(0)
        try:
            if not room:
                raise NotEnoughMemory("there is no room", remedy="make some")
            future.set_result(work())
        except StagingError as error:
            future.set_exception(error)
        self.made.append(future)


@dataclass(frozen=True)
class Piece:
    """What a trainer rank writes in one go: the elements of a box, or one of the fields of its moments."""

    array: Array
    counts_nonfinite: bool

    def write(self, stamp: int, *, poison: bool = False) -> None:
        self.array[...] = int(poison) if self.counts_nonfinite else stamp


def pieces(memory: memoryview, catalog: Catalog, rank: int) -> list[list[Piece]]:
    """Everything in a slot that a rank writes, box by box."""
    stored = StoredMoments(memory[catalog.moments_offset :][: stored_bytes(catalog.cells)], catalog.cells)
    return [list(_pieces_of_box(memory, catalog, owned, stored)) for owned in catalog.owned_by(rank)]


def _pieces_of_box(memory: memoryview, catalog: Catalog, owned: OwnedBox, stored: StoredMoments) -> Iterator[Piece]:
    tensor = catalog.tensors[owned.tensor]
    kind = np.dtype(f"u{ITEM_BYTES[tensor.dtype]}")
    elements = np.frombuffer(memory, kind, tensor.bytes // kind.itemsize, tensor.offset).reshape(tensor.shape)
    yield Piece(elements[owned.box.slices], False)
    if tensor.has_moments:
        cells = sum(cells_of(grid, tensor.shape, owned.box).volume for grid in catalog.grids)
        for name in ("mean", "m2", "amax", "nonfinite"):
            field_cells = getattr(stored, name)[owned.first_cell : owned.first_cell + cells]
            yield Piece(field_cells, name == "nonfinite")


class Memory:
    """A stage's segment as its clients map it; of slots what trainers write, and apart from it how far they are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.segment = segment.open_existing(name, writable=True)
        self.catalog = self.segment.catalog
        self.slots = [self.segment.slot(index)[: self.catalog.progress_offset] for index in (0, 1)]
        self.progress = [self.segment.progress(index) for index in (0, 1)]
        self.everything = Needs(tuple(len(self.catalog.owned_by(rank)) for rank in range(self.catalog.ranks)))
        self._pieces = [[pieces(slot, self.catalog, rank) for rank in range(self.catalog.ranks)] for slot in self.slots]

    def pieces(self, slot: int, rank: int) -> list[list[Piece]]:
        return self._pieces[slot][rank]

    def image(self, stamps: dict[int, int]) -> bytes:
        """The bytes of a slot in which every rank has written everything with its stamp."""
        slot = bytearray(self.catalog.progress_offset)
        for rank, stamp in stamps.items():
            for piece in itertools.chain(*pieces(memoryview(slot), self.catalog, rank)):
                piece.write(stamp)
        return bytes(slot)

    def close(self) -> None:
        self._pieces.clear()
        self.slots.clear()
        self.progress.clear()
        self.segment.close()


def declared_tensors(rank: int, ranks: int, *, row_missing: bool = False) -> tuple[TensorDeclaration, ...]:
    """Rows of one tensor, the last rank one more; columns of one with moments; a replica of a third."""
    rows, columns = (2 * ranks + 1,), (2, ranks)
    own_rows = Box((2 * rank,), ((3 if rank == ranks - 1 else 2) - row_missing,))
    return (
        TensorDeclaration(name="rows", dtype="int32", shape=rows, boxes=(own_rows,)),
        TensorDeclaration(name="columns", dtype="bfloat16", shape=columns, boxes=(Box((0, rank), (2, 1)),)),
        TensorDeclaration(name="replica", dtype="int64", shape=(3,), boxes=(whole((3,)),)),
    )
