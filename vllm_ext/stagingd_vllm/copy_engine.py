# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Carrying moves out by way of two buffers on the device: one is filled while what is in the other is treated.

Copies take none of the device's multiprocessors; treating what has landed takes all of them, for some microseconds.
While the device computes for an engine, a pace says when copies may be handed to it; else they all are at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from stagingd_vllm.crossings import NARROWEST, NARROWEST_BESIDE, Copy, Crossings, crossings
from stagingd_vllm.moves import Move, refuse_short
from stagingd_vllm.pace import Pace

BUFFER_BYTES: Final = 32 * 2**20
"""At least 0.6 ms of a link: many times what the host needs to ask for the next."""
BUFFERS: Final = 2
FIRST_RATE: Final = 20e9
"""Bytes a second, until it has been measured."""
TELLING: Final = 2**20
"""Bytes of a crossing whose time tells the rate."""

Treat = Callable[[int], None]
"""Starts carrying out some moves on the device's current queue, from an address."""


class Mark(Protocol):
    """A point in a queue."""

    @property
    def reached(self) -> bool:
        """Whether everything queued before it is done. Never waits."""

    def wait(self) -> None:
        """Wait until it is."""

    def seconds_since(self, earlier: Mark) -> float:
        """Between two points that have been reached."""


class Queue(Protocol):
    """Work that a device does in order, while the host goes on."""

    def mark(self) -> Mark:
        """The point after everything queued so far."""

    def after(self, mark: Mark) -> None:
        """What is queued from now on waits for a mark; the host does not."""

    def computing(self) -> AbstractContextManager[object]:
        """While it is open, what the calling thread computes on the device is queued here."""

    def copy(self, copy: Copy, slot: int, buffer: int) -> None:
        """Copy to the device.

        Args:
            copy: which bytes.
            slot, buffer: addresses that the copy's places are counted from.
        """


class Device(Protocol):
    """The device that the live weights are on."""

    @property
    def copying(self) -> Queue:
        """The queue of copies."""

    def current(self) -> Queue:
        """The queue that the calling thread's computations go to."""

    def buffer(self, size: int) -> int:
        """The address of memory on the device, which lives as long as this object."""

    def treating(self, moves: Sequence[Move], *, landed: bool, beside: bool) -> Treat:
        """Get ready to carry moves out, from a buffer where they have landed, or else from the slot itself.

        Args:
            moves: what is carried out.
            landed: whether they have landed.
            beside: whether the device computes meanwhile, and is to be disturbed least.
        """


@dataclass
class _Buffer:
    address: int
    bytes: int = 0
    begun: Mark | None = None
    landed: Mark | None = None
    treated: Mark | None = None


class CopyEngine:
    """A device's copy engine, and buffers for what it brings.

    Args:
        device: whose.
        size: bytes of a buffer.
    """

    def __init__(self, device: Device, size: int = BUFFER_BYTES) -> None:
        self._device = device
        self._pace: Pace[Mark] | None = None
        self._size = size
        self._rate = FIRST_RATE
        self._buffers = [_Buffer(device.buffer(size)) for _ in range(BUFFERS)]

    @property
    def nbytes(self) -> int:
        """Device memory that the buffers take."""
        return self._size * BUFFERS

    @contextmanager
    def paced(self, pace: Pace[Mark]) -> Iterator[None]:
        """While it is open, copies keep to a pace."""
        with pace.watching():
            self._pace = pace
            try:
                yield
            finally:
                self._pace = None

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """While it is open, what the calling thread computes comes before all copies, and treatments, that follow.

        It waits for the copies before it, and not for their treatment.
        """
        with self._device.copying.computing():
            yield
        self._device.current().after(self._device.copying.mark())

    def begin(self) -> None:
        """Have all that follows wait for what the device's current queue was given: it may use what is written now."""
        self._device.copying.after(self._device.current().mark())

    def carrier(self, moves: Sequence[Move], *, beside: bool = False) -> BufferedCarrier:
        """Who carries moves out by way of the buffers.

        Args:
            moves: what is carried.
            beside: whether the device computes meanwhile, and is to be disturbed least.

        Raises:
            MoveRefused: a move contradicts itself.
        """
        cut = crossings(moves, self._size, NARROWEST_BESIDE if beside else NARROWEST)
        return BufferedCarrier(cut, self, self._device, beside=beside)

    def cross(self, copies: Sequence[Copy], slot: int, treat: Treat) -> None:
        """Start copies into the next buffer, and what is done with it on the device's current queue.

        Waits until the pace, if there is one, admits them; not for the device, unless its engine is idle.

        Args:
            copies: they fit a buffer.
            slot: address of the slot.
            treat: carries out the moves whose sources are in the buffer.
        """
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        self._measure(buffer)
        copying, current = self._device.copying, self._device.current()
        size = sum(copy.bytes for copy in copies)
        if buffer.treated is not None:
            copying.after(buffer.treated)
        if self._pace is not None:
            self._keep_pace(self._pace, buffer, size)
        begun = copying.mark()
        try:
            for copy in copies:
                copying.copy(copy, slot, buffer.address)
        finally:
            landed = copying.mark()
            current.after(landed)  # whatever failed: who waits for the current queue waits for the copies
        treat(buffer.address)
        buffer.bytes, buffer.begun, buffer.landed, buffer.treated = size, begun, landed, current.mark()

    def _keep_pace(self, pace: Pace[Mark], buffer: _Buffer, size: int) -> None:
        inputs = pace.admit(size / self._rate)
        if inputs is not None:
            self._device.copying.after(inputs)
        if pace.idle and buffer.treated is not None:
            buffer.treated.wait()  # so that a step that begins finds no more than two buffers on their way

    def _measure(self, buffer: _Buffer) -> None:
        """Learn the link's rate from what crossed last in a buffer."""
        if buffer.begun is None or buffer.landed is None or not buffer.landed.reached or buffer.bytes < TELLING:
            return
        seconds = buffer.landed.seconds_since(buffer.begun)
        if seconds > 0:
            self._rate = buffer.bytes / seconds


@dataclass(frozen=True)
class Paced:
    """A copy engine that keeps to a pace while it is at work; ``close`` stops watching what sets the pace."""

    copies: CopyEngine
    pace: Pace[Mark]
    close: Callable[[], None] = lambda: None

    def at_work(self) -> AbstractContextManager[None]:
        """While it is open, copies cross, at the pace."""
        return self.copies.paced(self.pace)


class BufferedCarrier:
    """One set of moves, from either slot. ``CopyEngine.carrier`` makes it."""

    def __init__(self, cut: Crossings, engine: CopyEngine, device: Device, *, beside: bool) -> None:
        self._engine = engine
        self._end = cut.source_end
        self._crossings = [
            (crossing, device.treating(crossing.moves, landed=True, beside=beside)) for crossing in cut.buffered
        ]
        self._direct = device.treating(cut.direct, landed=False, beside=beside) if cut.direct else None

    def carry(self, slot: torch.Tensor) -> None:
        """Start carrying all moves out, on the device's current queue, as a pace admits it.

        Args:
            slot: the slot's bytes: uint8, in this process's memory, registered with the device.

        Raises:
            MoveRefused: the slot is too small for the moves.
        """
        refuse_short(slot.numel(), self._end)
        for crossing, treat in self._crossings:
            self._engine.cross(crossing.copies, slot.data_ptr(), treat)
        if self._direct is not None:
            self._direct(slot.data_ptr())
