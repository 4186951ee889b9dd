# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Two versions that an engine takes in turns: one is prefetched while it computes with the other.

As a ``Follower`` has them taken: one call to the engine for each, which swaps in what was read and has the workers
prefetch the other one; and no word to the engine until the daemon says that all of them have read it.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import zmq
import zmq.asyncio
from stagingd_vllm.answers import checked

from benchmarks.host_case import BenchmarkFailed
from stagingd import wire
from stagingd.connection import Connection

READ_S = 60.0
"""The longest that a version may take to be read, in seconds."""


class Turns:
    """The newest version and the one before, of a stage that nobody publishes to meanwhile.

    Args:
        llm: an ``AsyncLLM``, attached to ``stage``, that computes with ``version``.
        stage: its name.
        version: that the engine computes with.
        other: the other one.
        connection: to the daemon.
    """

    def __init__(self, llm: Any, stage: str, version: int, other: int, connection: Connection) -> None:
        self._llm = llm
        self._stage = stage
        self._events_at = connection.event_socket
        self.version, self.other = version, other

    async def __aenter__(self) -> Turns:
        """Have the other one prefetched."""
        self._events = zmq.asyncio.Context.instance().socket(zmq.SUB)
        self._events.connect(f"ipc://{self._events_at}")
        self._events.subscribe(self._stage.encode())
        await self._ask("stagingd_prefetch", version=self.other)
        return self

    async def take(self) -> None:
        """Have the other one live as soon as it has been read, and this one prefetched."""
        await self._read()
        await self._ask("stagingd_take", version=self.other, then=self.version)
        self.version, self.other = self.other, self.version

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Wait until nothing is being read."""
        try:
            if kind is None:
                await self._read()
        finally:
            self._events.close(linger=0)

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(READ_S):
                while True:
                    event = wire.decode_event((await self._events.recv_multipart())[1])
                    if event.event == "released" and event.version == self.other:
                        return
        except TimeoutError as error:
            raise BenchmarkFailed(
                f"version {self.other} of {self._stage} has not been read within {READ_S:g} s",
                remedy="the engine's own words are above",
            ) from error

    async def _ask(self, method: str, **arguments: Any) -> None:
        checked(await self._llm.collective_rpc(method, kwargs=arguments))
