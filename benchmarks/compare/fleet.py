# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The trainers of a comparison, as whoever measures sees them: told to make weights, and to send them, all at once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.compare.case import Case
from benchmarks.compare.trainer import Alone, Ask, Copied, Failed, Held, Maker, Order, Post, Sent, Settled, work
from benchmarks.host import ENDING_S, end
from benchmarks.host_case import BenchmarkFailed
from benchmarks.nccl import free_port

ANSWER_S = 300.0
"""The longest that trainers may take to start, to make weights or to send them, in seconds."""

Asked = Callable[[Any], Awaitable[None]]
"""Does what a trainer asks of whoever measures, such as calling the engine."""


async def refuse(what: Any) -> None:
    """For trainers that have nothing to ask. Raises BenchmarkFailed."""
    raise BenchmarkFailed(f"a trainer asks for {type(what).__name__}", remedy="give the fleet who answers it")


class Fleet:
    """Processes of trainer ranks. ``fleet`` starts and ends them.

    Attributes:
        newest: the version whose weights they have.
        done_at: when nothing of the last version went on in any rank any more, by ``time.monotonic``; None until then.
    """

    def __init__(self, case: Case, make: Maker, arguments: Mapping[str, Any], asked: Asked) -> None:
        self._asked = asked
        self._connections: list[Connection] = []
        self._processes = []
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(case.layout.trainers):
            ours, theirs = multiprocessing.Pipe()
            post = Post(case, rank, port, arguments)
            process = context.Process(target=work, args=(post, make, theirs), name=f"trainer {rank}")
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._settling: asyncio.Task[Settled] | None = None
        self.newest = 0
        self.done_at: float | None = None

    async def ready(self) -> None:
        """Wait until all of them have joined the system."""
        await self._answers(type(None))

    async def prepare(self) -> int:
        """Have them make the weights of one more version, which it gives."""
        await self.settled()
        self.done_at = None
        self.newest += 1
        self._tell(Order.PREPARE)
        await self._answers(type(None))
        return self.newest

    async def send(self) -> float:
        """Have them send their weights; gives the seconds for which that held the host of the slowest."""
        self.done_at = None
        self._tell(Order.SEND)
        sent = await self._answers(Sent)
        self._settling = asyncio.create_task(self._settle())
        return max(float(one.blocked_s) for one in sent)

    async def settled(self) -> Settled:
        """Wait until nothing goes on beside them; gives the most device memory that the last version took of one."""
        if self._settling is None:
            return Settled(0, 0)
        return await asyncio.shield(self._settling)  # which goes on though whoever waits does not

    async def _settle(self) -> Settled:
        told = await self._answers(Settled)
        self.done_at = time.monotonic()
        return Settled(*(max(getattr(one, field.name) for one in told) for field in dataclasses.fields(Settled)))

    async def ceiling(self) -> float:
        """Bytes a second out of their devices, all at once and taken together."""
        await self.settled()
        self._tell(Order.CEILING)
        return sum(float(one.bytes_per_s) for one in await self._answers(Copied))

    async def wire(self) -> float | None:
        """Seconds of the system's wire alone, of the slowest rank, where it can be had."""
        await self.settled()
        self._tell(Order.WIRE)
        seconds = [one.seconds for one in await self._answers(Alone) if one.seconds is not None]
        return max(seconds, default=None)

    async def host_bytes(self) -> int:
        """What the system holds of the node's memory in the trainers, all taken together."""
        await self.settled()
        self._tell(Order.HOST)
        return sum(one.host_bytes for one in await self._answers(Held))

    async def forget(self) -> None:
        """Wait for nothing any more that goes on beside the trainers."""
        if self._settling is not None:
            self._settling.cancel()
            await asyncio.wait([self._settling], timeout=ENDING_S)

    def end(self) -> None:
        """Let them end; whoever is held is killed."""
        for connection in self._connections:
            with contextlib.suppress(ConnectionError):  # it has ended
                connection.send(Order.END)
        for process in self._processes:
            process.join(ENDING_S)
            end(process)
        for connection in self._connections:
            connection.close()

    def _tell(self, order: Order) -> None:
        for connection in self._connections:
            connection.send(order)

    async def _answers(self, kind: type[Any]) -> list[Any]:
        """One of each rank, of this type. Raises BenchmarkFailed: one has ended, or says nothing."""
        return await asyncio.gather(*(self._answer(connection, kind) for connection in self._connections))

    async def _answer(self, connection: Connection, kind: type[Any]) -> Any:
        while True:
            said = await asyncio.to_thread(_received, connection)
            if isinstance(said, Ask):
                await self._asked(said.what)
                connection.send(None)
            elif isinstance(said, kind):
                return said
            elif isinstance(said, Failed):
                raise BenchmarkFailed(f"a trainer has ended: {said.words}", remedy="its own words are above")
            else:
                raise BenchmarkFailed(f"a trainer said {said!r}", remedy="its own words are above")


def _received(connection: Connection) -> Any:
    try:
        if connection.poll(ANSWER_S):
            return connection.recv()
    except (EOFError, OSError) as error:
        raise BenchmarkFailed("a trainer has ended", remedy="its own words are above") from error
    raise BenchmarkFailed(f"a trainer has said nothing for {ANSWER_S:g} s", remedy="its own words are above")


@asynccontextmanager
async def fleet(
    case: Case, make: Maker, arguments: Mapping[str, Any] | None = None, asked: Asked = refuse
) -> AsyncIterator[Fleet]:
    """The trainers of a case; ``ready`` is still to be awaited, for some join the engine before they are.

    Args:
        case: says how many, and where.
        make: makes each rank's sender, in its process.
        arguments: of the system, for ``make``.
        asked: does what a trainer asks.
    """
    found = Fleet(case, make, arguments or {}, asked)
    try:
        yield found
    finally:
        await found.forget()
        await asyncio.to_thread(found.end)
