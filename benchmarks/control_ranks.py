# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The processes of ``benchmarks.control``: trainer ranks and reader ranks, on the real lane and on the bare one."""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.control_bare import BareLine, Recorded
from benchmarks.control_case import COLUMNS, STEP_S, WARM_UP, Case, Exchange, Lane, Spans, lanes
from benchmarks.control_gate import Gate
from benchmarks.host_case import BenchmarkFailed
from stagingd import segment, wire
from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration
from stagingd.connection import Connection
from stagingd.errors import StagingError
from stagingd.record import Record

STAGE = "control"
ENGINE = "bench"
TENSOR = "tiny.weight"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Place:
    """A process's part in a case: who it is, and what it shares with the others.

    Attributes:
        socket, bare: the daemon's control socket and the relay's.
        gate: all ranks of its kind wait at it before and after every exchange.
        spans: where they go in the end.
    """

    case: Case
    rank: int
    socket: Path
    bare: Path
    gate: Gate
    spans: Pipe


@dataclass(frozen=True)
class Move:
    """What a rank does next.

    Attributes:
        message: what it asks.
        answer: the kind of answer that it expects.
        use: what it does with the answer, when all ranks have theirs. Raises BenchmarkFailed.
    """

    exchange: Exchange
    message: wire.Request
    answer: type[Record]
    use: Callable[[Any], None]


class Trainer:
    """Writes its row of the one tensor that there is."""

    title = "trainer"

    def __init__(self, place: Place, connection: Connection) -> None:
        self._case, self._rank = place.case, place.rank
        shape, row = (self._case.trainers, COLUMNS), Box((self._rank, 0), (1, COLUMNS))
        message = wire.Declare(
            stage=STAGE,
            rank=self._rank,
            ranks=self._case.trainers,
            options=wire.StageOptions(),
            tensors=(TensorDeclaration(name=TENSOR, dtype="bfloat16", shape=shape, boxes=(row,)),),
            timeout_s=STEP_S,
        )
        declared = connection.request(message, wire.Declared, timeout_s=STEP_S)
        self._segment = segment.open_existing(declared.segment, writable=True)

    def moves(self, number: int) -> Iterator[Move]:
        """Begin, put and commit both versions of a round."""
        for version, exchange in zip(self._case.versions(number), (Exchange.COMMIT, Exchange.SEAL), strict=True):
            common: Any = {"stage": STAGE, "rank": self._rank, "version": version, "timeout_s": STEP_S}
            yield Move(Exchange.BEGIN, wire.Begin(**common), wire.Begun, self._putting(version))
            yield Move(exchange, wire.Commit(boxes=1, **common), wire.Sealed, self._checking(version))

    def _putting(self, version: int) -> Callable[[wire.Begun], None]:
        def put(begun: wire.Begun) -> None:
            check("slot begun", begun.slot, self._case.slot(version))
            row = self._case.row(version, self._rank)
            at = self._segment.catalog.tensor(TENSOR).offset + self._rank * len(row)
            self._segment.slot(begun.slot)[at : at + len(row)] = row

        return put

    def _checking(self, version: int) -> Callable[[wire.Sealed], None]:
        return lambda sealed: check("version sealed", sealed.version, version)


class Reader:
    """Compares the whole tensor, in the slot, with what the trainer ranks write."""

    title = "reader"

    def __init__(self, place: Place, connection: Connection) -> None:
        self._case, self._rank = place.case, place.rank
        ranks = self._case.readers
        message = wire.Attach(stage=STAGE, engine=ENGINE, rank=self._rank, ranks=ranks, timeout_s=STEP_S)
        attached = connection.request(message, wire.Attached, timeout_s=STEP_S)
        self._segment = segment.open_existing(attached.segment, writable=False)
        self._lease = 0

    def moves(self, number: int) -> Iterator[Move]:
        """Wait for the first version of a round, flip to the second."""
        awaited, flipped = self._case.versions(number)
        yield self._leasing(Exchange.WAIT, awaited, newer_than=awaited - 1)
        yield self._releasing()
        yield self._leasing(Exchange.FLIP, flipped, newer_than=None)
        yield self._releasing()

    def _leasing(self, exchange: Exchange, version: int, newer_than: int | None) -> Move:
        def look(leased: wire.Leased) -> None:
            self._lease = leased.lease
            check("version leased", leased.version, version)
            check("slot leased", leased.slot, self._case.slot(version))
            expected, at = self._case.whole(version), self._segment.catalog.tensor(TENSOR).offset
            check("bytes", bytes(self._segment.slot(leased.slot)[at : at + len(expected)]), expected)

        message = wire.LeaseVersion(
            stage=STAGE, engine=ENGINE, rank=self._rank, newer_than=newer_than, timeout_s=STEP_S
        )
        return Move(exchange, message, wire.Leased, look)

    def _releasing(self) -> Move:
        message = wire.Release(stage=STAGE, lease=self._lease, rank=self._rank)
        return Move(Exchange.RELEASE, message, wire.Done, lambda _: None)


Role = type[Trainer] | type[Reader]


def check(what: str, found: object, expected: object) -> None:
    """Raises BenchmarkFailed unless both are the same."""
    if found != expected:
        raise BenchmarkFailed(f"{what}: {found!r} where {expected!r} was expected", remedy="report this")


def work(role: Role, place: Place) -> None:
    """A process: all rounds, in step with the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler cleans up what is the parent's
    gc.freeze()  # the parent's objects are not this process's to look through
    try:
        _take_all(role, place)
    except StagingError as error:
        sys.exit(f"{role.title} {place.rank}: {error}")  # one line of each: many may fail of the same


def _take_all(role: Role, place: Place) -> None:
    with Connection(place.socket, name=f"{role.title} rank {place.rank}") as connection, BareLine(place.bare) as bare:
        taking = Taking(place, role(place, connection), connection, bare)
        for number in place.case.all_rounds:
            taking.round(number)
        place.gate.wait()  # who leaves early would be taken for dead
        place.spans.send({lane: dict(spans) for lane, spans in taking.spans.items()})


class Taking:
    """A rank's way through the rounds. Only what lies between a request and its answer is timed."""

    def __init__(self, place: Place, member: Trainer | Reader, connection: Connection, bare: BareLine) -> None:
        self._place = place
        self._member = member
        self._connection = connection
        self._bare = bare
        self._recorded: list[Recorded] = []
        self.spans: Spans = {lane: defaultdict(list) for lane in Lane}

    def round(self, number: int) -> None:
        """Both lanes of a round."""
        for lane in lanes(number):
            (self._stagingd if lane is Lane.STAGINGD else self._repeat)(number)

    def _stagingd(self, number: int) -> None:
        had = []
        for move in self._member.moves(number):
            answer = self._exchange(number, Lane.STAGINGD, move.exchange, partial(self._request, move))
            move.use(answer)
            had.append((move, answer))
        self._recorded = [
            Recorded(m.exchange, wire.encode(m.message), wire.encode(answer), self._place.case.gathered(m.exchange))
            for m, answer in had
        ]

    def _request(self, move: Move) -> Record:
        return self._connection.request(move.message, move.answer, timeout_s=STEP_S)

    def _repeat(self, number: int) -> None:
        self._bare.expect(self._recorded)
        for one in self._recorded:
            answer = self._exchange(number, Lane.BARE, one.exchange, partial(self._bare.ask, one.request))
            check("the relay's answer", answer, one.answer)

    def _exchange(self, number: int, lane: Lane, exchange: Exchange, ask: Callable[[], Answer]) -> Answer:
        self._place.gate.wait()
        start = time.monotonic_ns()
        answer = ask()
        end = time.monotonic_ns()
        self._place.gate.wait()  # nobody does anything else while others wait for their answers
        if number >= WARM_UP:
            self.spans[lane][exchange].append((start, end))
        return answer
