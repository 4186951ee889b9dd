# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The reader's side of a stage: attach, lease a version, read boxes and merged moments, release.

    with Reader.attach("policy", engine="engine-0", rank=0, ranks=2) as reader:
        with reader.lease() as lease:
            rows = lease.read("lm_head.weight", Box((0, 0), (512, 256)))
            amax = lease.moments("lm_head.weight", Grid.TENSOR).amax

It knows nothing of any engine. What it reads are views of shared memory: good until the release.

A version that is leased early is still being filled. What is needed of it is waited for, piece by piece, by what
trainers tell in the slot; and what was read counts once the release has succeeded, which waits for the seal.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from stagingd import segment, wire
from stagingd.boxes import Box, fits, intersect, relative, whole
from stagingd.catalog import Catalog
from stagingd.connection import Connection
from stagingd.errors import (
    BoxOutside,
    DaemonUnreachable,
    DeadlineExceeded,
    LeaseLost,
    OutOfOrder,
    StagingError,
)
from stagingd.moments import Grid, Moments, StoredMoments, cells_of, merge_boxes
from stagingd.progress import Needs, Progress, supported

LOOK_S = 0.0002
"""How often it is looked how far a version has come that is being filled, in seconds."""
ASKED_S = 1.0
"""Before a lease's time is up the daemon is asked for how long, at most, to say who keeps a version from its seal."""
LEAST_S = 0.001
"""The least time that the daemon can be given, in seconds."""


class EarlyRefused(StagingError):
    """Versions cannot be read before they are sealed on this machine."""

    code = "early_refused"


class Reader:
    """One rank of a reader group (an engine). Use ``Reader.attach``.

    All ranks of an engine get the same version: the first of them to ask decides which.
    """

    def __init__(self, stage: str, engine: str, rank: int, connection: Connection, mapped: segment.Segment) -> None:
        self.stage = stage
        self.engine = engine
        self.rank = rank
        self._connection = connection
        self._in_doubt = False
        self._leaving = threading.Event()
        self._segment = mapped
        self._memory = [_as_bytes(mapped.slot(slot)) for slot in (0, 1)]

    @classmethod
    def attach(
        cls,
        stage: str,
        *,
        engine: str,
        rank: int,
        ranks: int,
        socket: str | os.PathLike[str] | None = None,
        timeout_s: float = 60.0,
    ) -> Reader:
        """Join an engine of a stage; waits until trainers have declared it.

        Args:
            stage: the stage's name.
            engine: the reader group's name, its own per engine.
            rank, ranks: this rank of the engine and their number.
            socket: the daemon's control socket; that of the settings by default.
            timeout_s: how long to wait for the stage, in seconds.

        Raises:
            DaemonUnreachable, SocketNotTrusted: there is no daemon to talk to.
            DeadlineExceeded: nobody has declared the stage in time.
            RankTaken, CatalogMismatch: the engine's name or rank count is in use otherwise.
        """
        request = wire.Attach(stage=stage, engine=engine, rank=rank, ranks=ranks, timeout_s=timeout_s)
        with ExitStack() as undo:
            connection = undo.enter_context(Connection(socket, name=f"engine {engine} rank {rank}"))
            answer = connection.request(request, wire.Attached, timeout_s=timeout_s)
            mapped = segment.open_existing(answer.segment, writable=False)
            undo.pop_all()
        return cls(stage, engine, rank, connection, mapped)

    @property
    def catalog(self) -> Catalog:
        """Every tensor of the stage."""
        return self._segment.catalog

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        """The bytes of both slots, uint8: shared memory that must not be written, good until ``close``."""
        return self._memory

    def lease(
        self,
        *,
        version: int | None = None,
        newer_than: int | None = None,
        early: bool = False,
        timeout_s: float = 60.0,
    ) -> Lease:
        """Lease a version for reading; the newest complete one by default, which becomes the front.

        Args:
            version: exactly this one.
            newer_than: wait for a version greater than this.
            early: where no complete version will do, one that is being filled will.
            timeout_s: how long to wait, in seconds.

        Raises:
            EarlyRefused: this processor does not show stores to others in their order.
            VersionNotAvailable: the version has been replaced.
            DeadlineExceeded: there was none in time; the message says who was awaited.
            VersionMismatch, OutOfOrder: the engine's ranks do not act together.
        """
        if early and not supported():
            raise EarlyRefused(
                f"versions cannot be read early on a processor of kind {platform.machine()!r}",
                remedy="read them once they are sealed: leave early out",
            )
        request = wire.LeaseVersion(
            stage=self.stage,
            engine=self.engine,
            rank=self.rank,
            version=version,
            newer_than=newer_than,
            early=early,
            timeout_s=timeout_s,
        )
        asked = time.monotonic()
        in_doubt = self._in_doubt
        leased = self._ask(request)
        old = newer_than is not None and leased.version <= newer_than
        if in_doubt and (old or version not in (None, leased.version)):
            with suppress(DeadlineExceeded, LeaseLost):  # an early one may just as well be lost
                self._release(leased.lease, LEAST_S)
            leased = self._ask(request)
        # Counted from before the question: the daemon's own clock for the lease started later.
        until = asked + leased.deadline_s
        memory, stored = self._memory[leased.slot], self._segment.moments(leased.slot)
        release = partial(self._release, leased.lease)
        filling = None if leased.attempt is None else Filling(self._segment.progress(leased.slot), leased.attempt)
        leaving = self._leaving
        return Lease(self.catalog, leased.version, memory, stored, until, release, filling, leaving)

    def _ask(self, request: wire.LeaseVersion) -> wire.Leased:
        """Where the daemon did not answer the last time, this rank may hold a lease: that one is taken up again."""
        if self._in_doubt:
            request = request.model_copy(update={"again": True, "version": None, "newer_than": None})
        with self._doubted():
            return self._connection.request(request, wire.Leased, timeout_s=request.timeout_s)

    def _release(self, lease: int, timeout_s: float) -> None:
        request = wire.Release(stage=self.stage, lease=lease, rank=self.rank, timeout_s=timeout_s)
        with self._doubted():
            self._connection.request(request, wire.Done, timeout_s=timeout_s)

    @contextmanager
    def _doubted(self) -> Iterator[None]:
        try:
            yield
        except DaemonUnreachable:
            self._in_doubt = True
            raise
        self._in_doubt = False

    def leave(self) -> None:
        """Whoever reads a version early in another thread waits for nothing more of it. ``close`` comes after that."""
        self._leaving.set()

    def close(self) -> None:
        """Leave the engine. May be called twice."""
        self._connection.close()
        self._memory.clear()
        self._segment.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Filling:
    """By which attempt a slot is being filled, and where it is told how far it has come."""

    progress: Progress
    attempt: int


class Lease:
    """A version that is certain not to be written until it is released or its time is up.

    One that was leased early may still be filled, or given up: its release tells.
    """

    def __init__(
        self,
        catalog: Catalog,
        version: int,
        memory: torch.Tensor,
        stored: StoredMoments,
        until: float,
        release: Callable[[float], None],
        filling: Filling | None = None,
        leaving: threading.Event | None = None,
    ) -> None:
        self.version = version
        self.bytes_read = 0
        self._catalog = catalog
        self._memory = memory
        self._stored = stored
        self._until = until
        self._release: Callable[[float], None] | None = release
        self._filling = filling
        self._leaving = leaving or threading.Event()

    @property
    def early(self) -> bool:
        """Whether it was still being filled when it was leased."""
        return self._filling is not None

    def await_moments(self) -> None:
        """Wait until all moments of what trainers quantize are there: then its scales are final.

        Raises:
            LeaseLost: the version was aborted, or the lease's time is up.
        """
        self._await(lambda filling: filling.progress.is_measured(filling.attempt))

    def await_boxes(self, needs: Needs) -> None:
        """Wait until boxes have landed, with their moments. Raises as ``await_moments``."""
        self._await(lambda filling: filling.progress.has(filling.attempt, needs))

    def _await(self, there: Callable[[Filling], bool]) -> None:
        self._check()
        while self._filling is not None and not there(self._filling):
            if not self._filling.progress.holds(self._filling.attempt):
                raise LeaseLost(
                    f"version {self.version} was aborted while it was being read",
                    remedy="discard what was read under it and lease again",
                    version=self.version,
                )
            if self._leaving.is_set():
                raise self._left()
            time.sleep(LOOK_S)
            self._check()

    def _left(self) -> LeaseLost:
        return LeaseLost(
            f"version {self.version} is not read any further: its reader leaves",
            remedy="attach again",
            version=self.version,
        )

    @property
    def slot(self) -> torch.Tensor:
        """The bytes of the version's slot, uint8. Raises LeaseLost, OutOfOrder: the lease is over."""
        self._check()
        return self._memory

    @property
    def stored(self) -> StoredMoments:
        """The version's moments, as trainers stored them. Raises LeaseLost, OutOfOrder: the lease is over."""
        self._check()
        return self._stored

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A box of a tensor, all of it by default, as a view of shared memory that must not be written.

        Raises:
            UnknownTensor, BoxOutside: there is no such thing in the stage.
            LeaseLost, OutOfOrder: the lease is over.
        """
        self._check()
        tensor = self._catalog.tensor(name)
        box = box if box is not None else whole(tensor.shape)
        _check_inside(name, box, tensor.shape)
        raw = self._memory[tensor.offset : tensor.offset + tensor.bytes]
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        part: torch.Tensor = raw.view(dtype).view(tensor.shape)[box.slices]
        self.bytes_read += part.numel() * part.element_size()
        return part

    def moments(self, name: str, grid: Grid, box: Box | None = None) -> Moments:
        """Moments of the whole cells that a box touches, merged from all trainer ranks' shards.

        A cell that reaches beyond the box counts with all its elements, so scales made from it are those
        of the whole tensor.

        Raises:
            UnknownTensor, BoxOutside: there is no such thing in the stage.
            OutOfOrder: the stage keeps no moments for this grid or dtype, or the lease is over.
            LeaseLost: the lease is over.
        """
        self._check()
        tensor = self._catalog.tensor(name)
        box = box if box is not None else whole(tensor.shape)
        _check_inside(name, box, tensor.shape)
        if grid not in self._catalog.grids or not tensor.has_moments:
            raise OutOfOrder(
                f"the stage keeps no moments of tensor {name!r} ({tensor.dtype}) for grid {grid.value!r}",
                remedy="open the stage with this grid on the trainers",
                tensor=name,
            )
        region = cells_of(grid, tensor.shape, box)
        parts = []
        for owned in self._catalog.owned_of(name):
            cells = cells_of(grid, tensor.shape, owned.box)
            common = intersect(cells, region)
            if common is not None:
                first = self._catalog.first_cell(owned, grid)
                stored = self._stored.of_box(first, grid, tensor.shape, owned.box)
                parts.append((common, stored.part(relative(common, cells))))
        return merge_boxes(region, parts)

    def _check(self) -> None:
        if self._release is None:
            raise OutOfOrder(f"version {self.version} is read after its release", remedy="lease it again")
        if time.monotonic() >= self._until:
            raise LeaseLost(
                f"the lease on version {self.version} is over: it was held too long",
                remedy="discard what was read under it and lease again; or raise STAGINGD_LEASE_S",
                version=self.version,
            )

    def release(self) -> None:
        """Give the version back. May be called twice. One that was leased early is waited for until it is sealed.

        Raises:
            LeaseLost: the lease ended before: what was read under it may be torn, and must be discarded.
            DeadlineExceeded: the version is not sealed when the lease's time is up; likewise.
        """
        if self._filling is not None and self._release is not None:
            self._await_seal(self._filling)
        release, self._release = self._release, None
        if release is not None:
            release(max(self._until - time.monotonic(), LEAST_S))

    def _await_seal(self, filling: Filling) -> None:
        """Without the daemon, whose answer is waited for by nothing else; the last moments are for it to say why."""
        while not filling.progress.is_sealed(filling.attempt) and filling.progress.holds(filling.attempt):
            if time.monotonic() > self._until - ASKED_S:
                return
            if self._leaving.is_set():
                self._give_up()
                raise self._left()
            time.sleep(LOOK_S)

    def _give_up(self) -> None:
        """Nobody waits for the seal of what is not wanted any more."""
        release, self._release = self._release, None
        if release is not None:
            with suppress(DeadlineExceeded, LeaseLost):
                release(LEAST_S)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self.early:
            self._give_up()
        else:
            self.release()


def _check_inside(name: str, box: Box, shape: tuple[int, ...]) -> None:
    if not fits(box, shape):
        raise BoxOutside(
            f"box {box} does not lie in tensor {name!r} of shape {shape}",
            remedy="read boxes inside the global shape",
            tensor=name,
            box=box,
        )


def _as_bytes(memory: memoryview) -> torch.Tensor:
    """The slot as a tensor. It is mapped read-only, so writing to it would end the process: nobody here does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)
