# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Flushing shards from a device, beside the trainer's own work.

Two queues work through a plan's chunks: one casts and packs a chunk into scratch memory and takes its moments,
the other copies it to the slot while the next chunk is cast into the other half of the scratch memory.

    trainer   … optimizer ─┬─ forward, backward ───────────────────────────┬─ fence ─ optimizer …
                      ready│                                           read│
    casting                └▶ chunk 0 ▶ chunk 1 ▶ (0 is copied) chunk 2 ▶ … ┘
    copying                     └▶ chunk 0 ──────▶ chunk 1 ──────▶ …            ▶ done: the version is committed

Every arrow between two lines is a mark that the later queue waits for. The host queues all of it and waits for
nothing, but the thread that commits the version: it looks whether ``done`` is reached. It looks for the marks of
groups of chunks on the way, too: what has landed is told in the slot, for readers that begin early.

What trainers quantize is measured before anything else, so that its moments can be merged, and scales be made of them,
while what is held as it is crosses. Its bytes follow behind that.

A trainer that is killed takes its device context, and with it all copies, to its end before its pidfd tells the
daemon; so nothing is written to a slot that has been given to somebody else.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from stagingd import format_scales
from stagingd.catalog import Catalog, OwnedBox
from stagingd.errors import DeadlineExceeded
from stagingd.format_scales import RankLimits
from stagingd.moments import Grid, StoredMoments, field_stride
from stagingd.segment import Segment
from stagingd_client import flush_plan
from stagingd_client.chunks import Chunk, Piece
from stagingd_client.copies import Copy
from stagingd_client.flush import Flusher
from stagingd_client.flush_plan import Group, Launch, Plan
from stagingd_client.holdings import Put
from stagingd_client.landings import Landings
from stagingd_client.queues import Device, Mark
from stagingd_client.strips import STRIP_FIELDS, QuantizingWork, Work

SCRATCH_BYTES: Final = 96 * 2**20
"""One half of the scratch memory: few chunks keep the host's part small, and both halves stay below 256 MiB."""
SMALLEST_SCRATCH_BYTES: Final = 4 * 2**20
ASIDE_BYTES: Final = 16 * 2**20
"""What the kernel does not read (integers, odd views) is set aside in memory of its own, up to so many bytes."""
PLANS_KEPT: Final = 64
"""Sets of shards that are put together; nearly always one."""
CHANGE_S: Final = 60.0
"""How long tables that are in use are waited for before they are changed, in seconds."""
LOOK_S: Final = 0.0005
"""How often the committing thread looks whether the copies are done, in seconds."""

Kept = TypeVar("Kept")
Numbers = npt.NDArray[np.int64]


@dataclass
class _Half:
    """One half of memory that is written while the other is copied; ``copied`` is when it may be overwritten."""

    memory: torch.Tensor
    copied: Mark | None = None


@dataclass(frozen=True)
class _Tables:
    """A plan's tables on the device, where its strips' moments go, and how the rest is flushed.

    Attributes:
        host_jobs, jobs: the job table, here and there.
        strips: of the plan.
        numbers: per group of the plan, which boxes have landed with it.
        numbers_of_unread: those that land last.
        partials, host_partials: the moments of strips, there and here.
        aside: pieces that go through memory of their own.
        one_by_one: pieces for which there is no room: the host waits for the device.
    """

    host_jobs: torch.Tensor
    jobs: torch.Tensor
    strips: torch.Tensor
    numbers: tuple[Numbers, ...]
    numbers_of_unread: Numbers
    partials: torch.Tensor
    host_partials: torch.Tensor
    aside: tuple[_Aside, ...]
    one_by_one: tuple[Piece, ...]


@dataclass(frozen=True)
class _Aside:
    """A piece that the kernel does not read: cast by torch, and written to the slot when the version is finished."""

    piece: Piece
    there: torch.Tensor
    here: torch.Tensor


@dataclass(frozen=True)
class _Landing:
    """What is to be stored and told when a mark is reached."""

    mark: Mark
    tell: Callable[[], None]


@dataclass
class _Scales:
    """The scales of a plan by which shards are quantized: of what they are made, and where they are, there and here.

    ``sent`` is when those here may be changed.
    """

    limits: RankLimits
    there: torch.Tensor
    here: torch.Tensor
    sent: Mark | None = None

    def fill(self, catalog: Catalog, stored: StoredMoments) -> None:
        """Make those of one version, here."""
        assert catalog.format is not None  # else nothing is quantized
        made = format_scales.scales(catalog.format, catalog.device, self.limits.of(stored))
        self.here.copy_(torch.from_numpy(made))


class DeviceFlusher:
    """Flushes one rank's shards that are on one device. Used by one thread, the one that talks to the daemon.

    Args:
        segment: the stage's memory.
        owned: by tensor, the boxes that this rank owns.
        device: the device.
        landings: where it is told what has landed.
        scratch_bytes: the most that each half of the scratch memory may take.
    """

    def __init__(
        self,
        segment: Segment,
        owned: Mapping[str, Sequence[OwnedBox]],
        device: Device,
        landings: Landings,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self._catalog: Catalog = segment.catalog
        self._stored = [segment.moments(slot) for slot in (0, 1)]
        self._slots = [torch.frombuffer(segment.slot(slot), dtype=torch.uint8).data_ptr() for slot in (0, 1)]
        self._one_by_one = Flusher(segment, owned)
        self._owned = owned
        self._device = device
        self._landings = landings
        mine = sum(self._bytes_of(box) for boxes in owned.values() for box in boxes)
        self._limit = min(scratch_bytes, max(SMALLEST_SCRATCH_BYTES, mine // 8))
        self._halves: list[_Half] = []
        self._cells: list[_Half] = []
        self._plans: OrderedDict[tuple[object, ...], tuple[Plan, _Tables]] = OrderedDict()
        self._quantizing: OrderedDict[tuple[object, ...], tuple[Plan, _Tables, _Scales]] = OrderedDict()
        self._unfinished: list[tuple[int, _Tables]] = []
        self._landing: deque[_Landing] = deque()
        self._measured: Mark | None = None
        self._copied: Mark | None = None

    def _bytes_of(self, owned: OwnedBox) -> int:
        tensor = self._catalog.tensors[owned.tensor]
        return tensor.bytes * owned.box.volume // math.prod(tensor.shape)

    def prepare(self, puts: Sequence[Put]) -> None:
        """Plan the flush of shards, and have the device compile its kernels: a first version does not wait for that."""
        plan, tables = self._planned(puts)
        memory = self._halves[0].memory
        cells = torch.empty_like(self._cells[0].memory).view(STRIP_FIELDS, -1)
        for launch in _one_of_each_kind(plan):
            self._device.casting.run(lambda launch=launch: self._cast(launch, tables, memory, cells))  # type: ignore[misc]
        if self._catalog.format is not None:
            self._prepare_quantizing(puts, memory)
        self._copied = self._device.casting.mark()

    def _prepare_quantizing(self, puts: Sequence[Put], memory: torch.Tensor) -> None:
        plan, tables, scales = self._planned_quantizing(puts)
        for launch in _one_of_each_kind(plan):
            self._device.casting.run(lambda launch=launch: self._quantize(launch, tables, scales, memory))  # type: ignore[misc]

    def flush(self, slot: int, puts: Sequence[Put], ready: Sequence[Mark]) -> Mark:
        """Queue the flush of shards.

        Args:
            slot: 0 or 1.
            puts: the shards.
            ready: when they have the values to be staged.

        Returns:
            When they have been read, so that they may be changed.
        """
        for mark in ready:
            self._device.casting.after(mark)
        plan, tables = self._planned(puts)
        for group, numbers in zip(plan.groups, tables.numbers, strict=True):
            self._flush_group(slot, plan, group, tables, numbers)
        self._set_aside(tables, puts)
        for piece in tables.one_by_one:
            shard = puts[piece.source].shard
            self._device.casting.run(lambda piece=piece, shard=shard: self._one_by_one.write_piece(slot, piece, shard))  # type: ignore[misc]
        self._fetch(tables)
        self._unfinished.append((slot, tables))
        read = self._device.casting.mark()
        self._device.copying.after(read)
        self._copied = self._device.copying.mark()
        return read

    def quantize(self, slot: int, puts: Sequence[Put]) -> Mark:
        """Queue the flush of what is quantized of shards, once the moments of all ranks are in the slot.

        Args:
            slot: 0 or 1.
            puts: the shards that were flushed before.

        Returns:
            When they have been read, so that they may be changed.

        Raises:
            DeadlineExceeded: the device has not come to the end of what was queued before.
        """
        plan, tables, scales = self._planned_quantizing(puts)
        self._wait_until(scales.sent, time.monotonic() + CHANGE_S)
        scales.fill(self._catalog, self._stored[slot])
        self._device.casting.run(lambda: _start_copy(scales.there, scales.here))
        scales.sent = self._device.casting.mark()
        for group, numbers in zip(plan.groups, tables.numbers, strict=True):
            for chunk, launches in plan.chunks[group.chunks.start : group.chunks.stop]:
                self._quantize_chunk(slot, chunk, launches, tables, scales)
            self._tell_when_landed(partial(self._landings.land, numbers))
        for number, piece in enumerate(plan.unread, len(plan.pieces)):
            some = piece.owned, piece.values(puts[piece.source].shard), scales.there[scales.limits.slice_of(number)]
            self._device.casting.run(lambda some=some: self._one_by_one.write_quantized(slot, *some))  # type: ignore[misc]
        read = self._device.casting.mark()
        self._device.copying.after(read)
        self._tell_when_landed(partial(self._landings.land, tables.numbers_of_unread))
        self._copied = self._device.copying.mark()
        return read

    def _quantize_chunk(
        self, slot: int, chunk: Chunk, launches: Sequence[Launch], tables: _Tables, scales: _Scales
    ) -> None:
        half = self._next(self._halves)
        for launch in launches:
            self._device.casting.run(lambda launch=launch: self._quantize(launch, tables, scales, half.memory))  # type: ignore[misc]
        self._device.copying.after(self._device.casting.mark())
        for copy in chunk.copies:
            self._device.copying.copy(copy, self._slots[slot], half.memory.data_ptr())
        half.copied = self._device.copying.mark()

    def _quantize(self, launch: Launch, tables: _Tables, scales: _Scales, memory: torch.Tensor) -> None:
        assert self._catalog.format is not None  # else nothing is quantized
        self._device.quantize(
            QuantizingWork(
                jobs=tables.jobs,
                strips=tables.strips,
                first_strip=launch.first_strip,
                count=launch.count,
                scratch=memory,
                scales=scales.there,
                kind=launch.kind,
                stage_format=self._catalog.format,
            )
        )

    def _next(self, halves: list[_Half]) -> _Half:
        halves.reverse()
        half = halves[0]
        if half.copied is not None:
            self._device.casting.after(half.copied)
        return half

    def _flush_group(self, slot: int, plan: Plan, group: Group, tables: _Tables, numbers: Numbers) -> None:
        for chunk, launches in plan.chunks[group.chunks.start : group.chunks.stop]:
            self._flush_chunk(slot, chunk, launches, tables)
        if len(plan.tensor_cells):
            self._device.copying.copy(
                _columns_of(tables.partials, group.strips), tables.host_partials.data_ptr(), tables.partials.data_ptr()
            )

        def tell() -> None:
            if len(plan.tensor_cells):
                plan.store_tensor_cells(group, tables.host_partials.numpy(), self._stored[slot])
            self._landings.land(numbers)

        landed = self._tell_when_landed(tell)
        if group.measures:
            self._measured = landed

    def _tell_when_landed(self, tell: Callable[[], None]) -> Mark:
        """Once all copies that have been queued are done; gives when. And now, what was waited for before."""
        self._landing.append(_Landing(mark := self._device.copying.mark(), tell))
        self._tell_what_landed()
        return mark

    def _tell_what_landed(self) -> None:
        while self._landing and self._landing[0].mark.reached:
            self._landing.popleft().tell()

    def _flush_chunk(self, slot: int, chunk: Chunk, launches: Sequence[Launch], tables: _Tables) -> None:
        casting, copying = self._device.casting, self._device.copying
        half = self._next(self._halves) if chunk.packed else self._halves[0]
        moments = self._next(self._cells) if chunk.begins_group else self._cells[0]
        stride = field_stride(chunk.cells) // moments.memory.element_size()
        cells = moments.memory[: STRIP_FIELDS * stride].view(STRIP_FIELDS, stride)
        for launch in launches:
            casting.run(lambda launch=launch: self._cast(launch, tables, half.memory, cells))  # type: ignore[misc]
        copying.after(casting.mark())
        address = self._slots[slot]
        for copy in chunk.copies:
            copying.copy(copy, address, half.memory.data_ptr())
        # In line: on a stream of their own these small copies held up the large ones, by 5 % of a version.
        for copy in chunk.cell_copies:
            copying.copy(copy, address, moments.memory.data_ptr())
        moments.copied = copying.mark()
        if chunk.packed:
            half.copied = moments.copied

    def _cast(self, launch: Launch, tables: _Tables, memory: torch.Tensor, cells: torch.Tensor) -> None:
        self._device.cast(
            Work(
                jobs=tables.jobs,
                strips=tables.strips,
                first_strip=launch.first_strip,
                count=launch.count,
                scratch=memory.view(launch.kind.staged),
                cells=cells,
                partials=tables.partials,
                kind=launch.kind,
                with_rows=Grid.ROW in self._catalog.grids,
                with_blocks=Grid.BLOCK in self._catalog.grids,
            )
        )

    def _set_aside(self, tables: _Tables, puts: Sequence[Put]) -> None:
        for aside in tables.aside:
            shard = puts[aside.piece.source].shard
            self._device.casting.run(lambda aside=aside, shard=shard: _cast_aside(aside, shard))  # type: ignore[misc]

    def _fetch(self, tables: _Tables) -> None:
        self._device.copying.after(self._device.casting.mark())
        for aside in tables.aside:
            self._device.copying.run(lambda aside=aside: _start_copy(aside.here, aside.there))  # type: ignore[misc]

    # Plans

    def _planned(self, puts: Sequence[Put]) -> tuple[Plan, _Tables]:
        """The plan for these shards, its job table filled in and on its way to the device."""
        shards, key = _addresses(puts), _key(puts)
        plan, tables = self._plans.get(key, (None, None))
        if plan is None or tables is None or not plan.fits(plan.addresses(shards)):
            plan = flush_plan.make(puts, self._owned, self._catalog, self._limit)
            tables = self._tables(plan)
        _keep(self._plans, key, (plan, tables))
        self._provide_scratch(plan)
        self._fill_in(plan, tables, shards)
        return plan, tables

    def _planned_quantizing(self, puts: Sequence[Put]) -> tuple[Plan, _Tables, _Scales]:
        """The plan by which they are quantized, likewise, and where its scales go."""
        shards, key = _addresses(puts), _key(puts)
        plan, tables, scales = self._quantizing.get(key, (None, None, None))
        if plan is None or tables is None or scales is None or not plan.fits(plan.addresses(shards)):
            plan, limits = flush_plan.make_quantizing(puts, self._owned, self._catalog, self._limit)
            tables = self._tables(plan, quantizing=True)
            there = self._device.memory(limits.count * 4).view(torch.float32)
            scales = _Scales(limits, there, self._device.host_memory(there))
        _keep(self._quantizing, key, (plan, tables, scales))
        self._fill_in(plan, tables, shards)
        return plan, tables, scales

    def _fill_in(self, plan: Plan, tables: _Tables, shards: Numbers) -> None:
        addresses = torch.from_numpy(plan.addresses(shards))
        if not torch.equal(tables.host_jobs[:, 0], addresses):
            self.wait_until_copied(time.monotonic() + CHANGE_S)  # they may be on their way to the device
            tables.host_jobs[:, 0] = addresses
            self._device.casting.run(lambda: _start_copy(tables.jobs, tables.host_jobs))

    def _tables(self, plan: Plan, *, quantizing: bool = False) -> _Tables:
        jobs, strips = torch.from_numpy(plan.jobs), torch.from_numpy(plan.strips)
        host_jobs = self._device.host_memory(jobs)
        host_jobs.copy_(jobs)
        on_device = self._device.memory(jobs.nbytes).view(torch.int64).view(jobs.shape)
        strips_there = self._device.memory(strips.nbytes).view(torch.int32).view(strips.shape)
        self._device.casting.run(lambda: _start_copy(strips_there, strips))
        partials = self._device.memory(4 * STRIP_FIELDS * len(strips)).view(torch.float32).view(STRIP_FIELDS, -1)
        host_partials = self._device.host_memory(partials)
        numbers = [
            self._numbers_of(plan.pieces[group.pieces.start : group.pieces.stop], quantizing) for group in plan.groups
        ]
        unread = self._numbers_of(plan.unread, quantizing)
        tables = host_jobs, on_device, strips_there, tuple(numbers), unread, partials, host_partials
        return _Tables(*tables, *self._rest(plan))

    def _numbers_of(self, pieces: Sequence[Piece], quantizing: bool) -> Numbers:
        """Of those whose values land: of what is quantized, only the moments do before."""
        values = (
            piece.owned
            for piece in pieces
            if quantizing or self._catalog.tensors[piece.owned.tensor].quantized_from is None
        )
        return self._landings.numbers_of(values)

    def _rest(self, plan: Plan) -> tuple[tuple[_Aside, ...], tuple[Piece, ...]]:
        """How what the kernel does not read is flushed."""
        aside, one_by_one, taken = [], [], 0
        for piece in plan.unread:
            dtype: torch.dtype = getattr(torch, self._catalog.tensors[piece.owned.tensor].value_dtype)
            size = piece.owned.box.volume * dtype.itemsize
            if taken + size > ASIDE_BYTES:
                one_by_one.append(piece)
                continue
            taken += size
            there = self._device.memory(size).view(dtype).view(piece.owned.box.lengths)
            aside.append(_Aside(piece, there, self._device.host_memory(there)))
        return tuple(aside), tuple(one_by_one)

    def _provide_scratch(self, plan: Plan) -> None:
        need = STRIP_FIELDS * field_stride(plan.cells)
        if self._cells and self._cells[0].memory.nbytes >= need:
            return
        self.wait_until_copied(time.monotonic() + CHANGE_S)  # what is given back may else be written anew too early
        self._halves = self._halves or [_Half(self._device.memory(self._limit)) for _ in range(2)]
        self._cells = [_Half(self._device.memory(need).view(torch.float32)) for _ in range(2)]

    # The end of a version

    def wait_until_copied(self, deadline: float) -> None:
        """Wait until all that was queued is in the slot, and tell what has landed meanwhile.

        Args:
            deadline: time.monotonic() seconds.

        Raises:
            DeadlineExceeded: the device has not come so far.
        """
        self._wait_until(self._copied, deadline)

    def _wait_until(self, mark: Mark | None, deadline: float) -> None:
        while mark is not None and not mark.reached:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    "the copies from the device to the slot did not end in time",
                    remedy="see what else keeps the device or its link busy, or allow more time",
                )
            self._tell_what_landed()
            time.sleep(LOOK_S)
        self._tell_what_landed()

    def finish_measuring(self, deadline: float) -> None:
        """Wait until the moments of what will be quantized are in the slot; what is held as it is may still cross.

        Args:
            deadline: time.monotonic() seconds.

        Raises:
            DeadlineExceeded: the device has not come so far.
        """
        if any(tables.aside or tables.one_by_one for _, tables in self._unfinished):
            self.finish(deadline)  # moments of these are taken last
        else:
            self._wait_until(self._measured, deadline)

    def finish(self, deadline: float) -> None:
        """Wait until everything is copied, and stage what was set aside. Raises DeadlineExceeded."""
        self.wait_until_copied(deadline)
        for slot, tables in self._unfinished:
            for aside in tables.aside:
                self._one_by_one.write(slot, aside.piece.owned, aside.here)
            self._landings.land(tables.numbers_of_unread)
        self._unfinished.clear()

    def abandon(self, deadline: float) -> None:
        """Wait until nothing is on its way to the slot any more. Raises DeadlineExceeded."""
        self._unfinished.clear()
        self._landing.clear()
        self.wait_until_copied(deadline)


def _one_of_each_kind(plan: Plan) -> Iterable[Launch]:
    return {launch.kind: launch for _, launches in plan.chunks for launch in launches}.values()


def _addresses(puts: Sequence[Put]) -> Numbers:
    return np.asarray([put.shard.data_ptr() for put in puts], np.int64)


def _key(puts: Sequence[Put]) -> tuple[object, ...]:
    return tuple((put.holding.number, put.holding.strides, put.shard.dtype) for put in puts)


def _keep(plans: OrderedDict[tuple[object, ...], Kept], key: tuple[object, ...], plan: Kept) -> None:
    plans[key] = plan
    plans.move_to_end(key)
    if len(plans) > PLANS_KEPT:
        plans.popitem(last=False)


def _columns_of(table: torch.Tensor, columns: range) -> Copy:
    """Some columns of a table of so many rows, to the same place in another."""
    item, pitch = table.element_size(), table.stride(0) * table.element_size()
    return Copy(columns.start * item, columns.start * item, len(columns) * item, table.shape[0], pitch, pitch)


def _cast_aside(aside: _Aside, shard: torch.Tensor) -> None:
    _start_copy(aside.there, aside.piece.values(shard))


def _start_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
