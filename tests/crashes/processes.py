# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Real processes in milliseconds: forked from a server that has imported torch and has neither threads nor sockets."""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

from crashes import actors
from crashes.points import Point
from crashes.waiting import DEADLINE_S, until
from stagingd.liveness import Process
from stagingd.segment import SHARED_MEMORY

CONTEXT: Final = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "torch", "stagingd.cli", "stagingd_client", "stagingd_vllm"])

PATIENCE_S: Final = 15.0
"""How long clients wait for a daemon that is to be restarted: its start must not be a race on a busy machine."""


class Actor:
    """A process that plays a part; it begins when it is watched."""

    def __init__(self, part: Callable[..., None], *given: str) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process: Any = CONTEXT.Process(target=part, args=(theirs, *given), daemon=True)
        self._process.start()
        theirs.close()
        self._watched = Process(self.pid)
        self.tell("begin")

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    @property
    def alive(self) -> bool:
        return not self._watched.ended

    def tell(self, word: str) -> None:
        """Let it go on."""
        self._pipe.send_bytes(word.encode())

    def said(self) -> str:
        """What it says next."""
        assert self._pipe.poll(DEADLINE_S), "nothing was said in time"
        return str(self._pipe.recv_bytes(), "utf-8")

    def died_at(self, point: Point) -> float:
        """Wait until it is killed, at that point and nowhere else. Returns when, on the monotonic clock."""
        at = self.ended()
        assert self._pipe.poll(0), f"it was not killed at {point.id}"
        assert self.said() == point.id
        assert self.exit_status() == -signal.SIGKILL
        return at

    def ended(self) -> float:
        """Wait until it has ended. Returns when, on the monotonic clock."""
        watch = select.poll()
        watch.register(self._watched.fd, select.POLLIN)
        assert watch.poll(DEADLINE_S * 1000), f"pid {self.pid} has not ended"
        return time.monotonic()

    def exit_status(self) -> int:
        """Its exit status, or the number of the signal that ended it, negative."""
        self._process.join(DEADLINE_S)
        status: int = self._process.exitcode
        return status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Nothing is left of it, whatever has happened. May be called twice."""
        if self._pipe.closed:
            return
        if self.alive:
            self.kill()
        self._process.join()
        self._process.close()
        self._watched.close()
        self._pipe.close()


@dataclass
class Place:
    """Where daemons serve, one after the other. A context."""

    folder: Path
    prefix: str = field(default_factory=lambda: f"/stagingd-test-{uuid.uuid4().hex[:12]}-")
    return_s: float = PATIENCE_S
    daemons: list[Actor] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.folder / "control.sock"

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def daemon(self, point: Point | None = None) -> Actor:
        """One more daemon that serves here, doomed or not."""
        self.folder.mkdir(exist_ok=True)
        given = (str(self.folder), self.prefix, str(self.return_s), "" if point is None else point.id)
        self.daemons.append(Actor(actors.daemon, *given))
        return self.daemons[-1]

    def segments(self) -> list[str]:
        return [path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(self.prefix.lstrip("/"))]

    def leftovers(self) -> list[str]:
        """Segments and sockets."""
        return self.segments() + [path.name for path in self.folder.glob("*.sock")]

    def stop(self) -> None:
        """Tell the last daemon to end; nothing is left of any."""
        last = self.daemons[-1]
        os.kill(last.pid, signal.SIGTERM)
        last.ended()
        assert last.exit_status() == 0, self.log
        left = self.leftovers()
        assert not left

    def end(self) -> None:
        """Kill whoever serves."""
        for daemon in self.daemons:
            if daemon.alive:
                daemon.kill()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End what a failed test has left; its report shows the daemons' log."""
        sys.stderr.write(self.log)
        for daemon in self.daemons:
            daemon.close()
        for segment in self.segments():
            (SHARED_MEMORY / segment).unlink()


@dataclass(frozen=True)
class Holdings:
    """What processes hold: descriptors, threads, and segments that they have mapped."""

    by_pid: dict[int, tuple[int, int, int]]

    @classmethod
    def of(cls, *pids: int) -> Holdings:
        return cls({pid: cls._of_one(psutil.Process(pid)) for pid in pids})

    @staticmethod
    def _of_one(process: psutil.Process) -> tuple[int, int, int]:
        return process.num_fds(), process.num_threads(), _maps(process.pid).count(f"{SHARED_MEMORY}/stagingd")

    def check_nothing_is_left(self) -> None:
        """Assert that the same processes hold no more than then. ZeroMQ closes in the background: it may take a moment.

        They may hold less: what was about to be closed then.
        """
        if self._more():
            gc.collect()  # errors that were caught hold on to what their frames held
            until(lambda: not self._more(), f"no more than {self}")

    def _more(self) -> bool:
        now = Holdings.of(*self.by_pid).by_pid
        return any(n > then for pid, held in self.by_pid.items() for n, then in zip(now[pid], held, strict=True))


def check_lets_go(daemon: int) -> None:
    """Assert that a daemon holds neither segments nor processes of clients any more."""
    until(
        lambda: not any(held in _links(daemon) + _maps(daemon) for held in ("pidfd", f"{SHARED_MEMORY}/")),
        f"pid {daemon} to let go",
    )


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def _links(pid: int) -> str:
    """What a process's descriptors are of."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(descriptor))
    return "\n".join(links)
