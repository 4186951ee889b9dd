# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Clients: their connections, the seats that they speak for, what they have in hand, and what they were told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from life.machine import Memory, Piece, Process
from stagingd import wire


@dataclass(eq=False)
class Asked:
    """A request that has not been answered yet.

    Attributes:
        seat: for whom.
        message, request_id: what is asked.
        sent: when.
        copying: what the seat had in hand then.
        arrived: when this daemon took it, if it has.
    """

    seat: Seat
    message: wire.Request
    request_id: bytes
    sent: float
    copying: Copying | None
    arrived: float | None = None


@dataclass(eq=False)
class Client:
    """A connection object of a process, as stagingd.connection has it: one request at a time, one token.

    Attributes:
        again: the request has to be repeated: its connection is gone, or its daemon.
        broken: the connection is gone, which it finds out when it next asks for something: so that goes out again.
        honest: as long as it does what the real one does. Then it never hears that it does things out of order.
    """

    process: Process
    token: bytes
    seats: list[Seat]
    identity: bytes | None = None
    asked: Asked | None = None
    again: bool = False
    broken: bool = False
    honest: bool = True
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))


@dataclass
class Copying:
    """A trainer rank fills a slot; ``left`` are the pieces to come, box by box. It may have been told not to."""

    memory: Memory
    slot: int
    version: int
    stamp: int
    left: list[list[Piece]]
    poison: bool = False

    @property
    def pieces_left(self) -> int:
        return sum(map(len, self.left))


@dataclass
class Reading:
    """A reader rank reads a slot.

    Attributes:
        attempt: which attempt fills it, where it is read early.
        seen: what was read early, once all of it had landed.
        torn: it has seen anything but one whole version.
        forsaken: the daemon cannot see its process, and has seen its connection break: it is taken for dead.
    """

    memory: Memory
    lease: int
    slot: int
    version: int
    until: float
    attempt: int | None = None
    seen: bytes | None = None
    torn: bool = False
    forsaken: bool = False


@dataclass(eq=False)
class Seat:
    """A rank of a stage's trainers, or of one of its engines, and the client that speaks for it at present.

    Attributes:
        stage, rank, ranks, engine: which it is; ``engine`` is None for a trainer.
        client: who speaks for it.
        seated: the client knows that it has declared or attached.
        copying: what a trainer fills, or would fill if it had not been aborted meanwhile.
        tried: the greatest version that it has begun.
        attempts: those that it has been told of.
        reading, returned: what a reader reads, and what it has released without having had an answer to that.
        last_read: the version that it read last.
        heard: the last answer.
    """

    stage: str
    rank: int
    ranks: int
    engine: str | None = None
    client: Client | None = None
    seated: bool = False
    copying: Copying | None = None
    tried: int = 0
    attempts: set[int] = field(default_factory=set)
    reading: Reading | None = None
    returned: Reading | None = None
    last_read: int | None = None
    heard: wire.Answer | None = None

    def leave(self) -> None:
        """Whoever sat here does nothing any more."""
        self.client, self.seated = None, False
        self.copying = self.reading = self.returned = self.last_read = None

    def __str__(self) -> str:
        return f"{self.stage} {self.engine or 'trainer'} {self.rank}"


@dataclass
class Known:
    """What clients were told of a stage, or could see: it must stay true.

    Attributes:
        promised: the newest version that anybody knows to be sealed; -1 for none.
        committed: per version and rank the stamp of the last commit that the daemon took.
        images: per sealed version what its slot holds.
        leased: per lease its version and slot.
        early: leases on versions that were being filled then.
        refilled: attempts that a trainer has begun to fill again, by pretending that it was not told of them: what was
            read of them early may be either.
        announced: the last version whose sealing was an event.
    """

    promised: int = -1
    committed: dict[int, dict[int, int]] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)
    leased: dict[int, tuple[int, int]] = field(default_factory=dict)
    early: set[int] = field(default_factory=set)
    refilled: set[int] = field(default_factory=set)
    announced: int = -1
