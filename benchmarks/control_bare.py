# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The bare lane of ``benchmarks.control``: a ROUTER that gathers requests and returns bodies it was told before."""

from __future__ import annotations

import signal
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import zmq

from benchmarks.control_case import STEP_S, Exchange
from benchmarks.host_case import BenchmarkFailed
from stagingd.errors import DeadlineExceeded

CONTROL = b""
"""The request id of what is not measured: what to answer, and how many are held."""


@dataclass(frozen=True)
class Recorded:
    """An exchange that a rank has had with the daemon.

    Attributes:
        request, answer: the bodies, byte for byte.
        gathered: how many requests must have come before any of them is answered.
    """

    exchange: Exchange
    request: bytes
    answer: bytes
    gathered: int


def relay(socket: Path) -> None:
    """A process: answer whoever asks, until terminated. Bodies are neither read nor made here."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler cleans up what is the parent's
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.RCVTIMEO, int(STEP_S * 1000))
        router.bind(f"ipc://{socket}")
        answers: dict[bytes, deque[tuple[int, bytes]]] = {}
        held: list[tuple[bytes, bytes, bytes]] = []
        while True:
            identity, request_id, *rest = router.recv_multipart()
            if request_id == CONTROL:
                answers.setdefault(identity, deque()).extend(_pairs(rest))
                router.send_multipart([identity, CONTROL, struct.pack("<Q", len(held))])
                continue
            gathered, body = answers[identity].popleft()
            held.append((identity, request_id, body))
            if len(held) == gathered:
                router.send_multipart(held.pop())  # the daemon, too, answers whoever came last first
                for waiting in held:
                    router.send_multipart(waiting)
                held.clear()


def _pairs(frames: list[bytes]) -> Iterable[tuple[int, bytes]]:
    sizes = (size for (size,) in map(struct.Struct("<Q").unpack, frames[::2]))
    return zip(sizes, frames[1::2], strict=True)


class BareLine:
    """A DEALER socket to the relay, one request at a time."""

    def __init__(self, socket: Path) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(STEP_S * 1000))
        self._socket.setsockopt(zmq.SNDTIMEO, int(STEP_S * 1000))
        self._socket.connect(f"ipc://{socket}")
        self._requests = 0

    def ask(self, body: bytes) -> bytes:
        """Send a request's body and wait for its answer's."""
        self._requests += 1
        return self._round_trip([struct.pack("<Q", self._requests), body])

    def expect(self, exchanges: Iterable[Recorded]) -> None:
        """Tell the relay what to answer to the requests that follow."""
        frames = ([struct.pack("<Q", one.gathered), one.answer] for one in exchanges)
        self._round_trip([CONTROL, *(frame for pair in frames for frame in pair)])

    def held(self) -> int:
        """How many requests the relay has not answered yet."""
        (count,) = struct.unpack("<Q", self._round_trip([CONTROL]))
        return int(count)

    def _round_trip(self, frames: list[bytes]) -> bytes:
        try:
            self._socket.send_multipart(frames)
            request_id, body = self._socket.recv_multipart()
        except zmq.Again as error:
            raise DeadlineExceeded(f"the relay has not answered within {STEP_S} s", remedy="report this") from error
        if request_id != frames[0]:
            raise BenchmarkFailed("the relay answers another request", remedy="report this")
        return body

    def close(self) -> None:
        """Hang up."""
        self._socket.close(linger=0)

    def __enter__(self) -> BareLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
