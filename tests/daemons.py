# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Real processes for tests: a daemon in a folder of its own, and clients that do what the test tells them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable, StagingError, from_code
from stagingd.segment import SHARED_MEMORY

DEADLINE_S = 30.0

OWN_PIDS = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A wrapper: the program runs in a pid namespace of its own, and dies with the wrapper."""

Found = TypeVar("Found")


def eventually(condition: Callable[[], Found], what: str) -> Found:
    """Ask until the condition holds, and return what it says: for what nobody tells us of."""
    until = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.002)
    return found


def need_root() -> None:
    """A check that is left out must not look like one that was passed."""
    if os.geteuid() != 0:
        pytest.fail("needs root: it starts processes of another user, or in another pid namespace")


def stop_where_it_stands(pid: int) -> None:
    """SIGSTOP, and wait until it has taken effect."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, f"pid {pid} to stop")


def _inside(process: subprocess.Popen[Any], wrapper: Sequence[str]) -> int:
    """The pid of the program itself: a wrapper such as ``unshare --fork`` stays, as its parent."""
    return psutil.Process(process.pid).children()[0].pid if wrapper else process.pid


@dataclass
class RunningDaemon:
    """A daemon that serves; ``stop`` it, kill it, or start its successor with ``restart``."""

    folder: Path
    prefix: str
    process: subprocess.Popen[bytes]
    options: tuple[str, ...] = ()
    wrapper: tuple[str, ...] = ()

    @property
    def socket(self) -> Path:
        return self.folder / "control.sock"

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    @property
    def pid(self) -> int:
        return _inside(self.process, self.wrapper)

    def status(self) -> wire.StatusReport:
        with Connection(self.socket, name="test") as connection:
            return connection.request(wire.Status(), wire.StatusReport)

    def stage(self, name: str) -> wire.StageStatus:
        return next(stage for stage in self.status().stages if stage.stage == name)

    def picture(self) -> tuple[wire.StageStatus, ...]:
        """All that a refusal must not change, without ages of leases."""
        return tuple(stage.model_copy(update={"leases": ()}) for stage in self.status().stages)

    def segments(self) -> list[str]:
        return [path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(self.prefix.lstrip("/"))]

    def segment(self, stage: str) -> Path:
        return SHARED_MEMORY / f"{self.prefix.lstrip('/')}{stage}"

    def end(self, number: int) -> int:
        """Send a signal that ends it. Returns its exit status."""
        os.kill(self.pid, number)
        return self.process.wait(DEADLINE_S)

    def stop(self) -> int:
        return self.end(signal.SIGTERM)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def restart(self) -> None:
        """Start its successor; kill it first, if it still lives."""
        if self.process.poll() is None:
            self.kill()
        self.process = start(self.folder, *self.options, prefix=self.prefix, wrapper=self.wrapper).process

    def clear(self) -> None:
        """Nothing is left of it, whatever a test has done."""
        if self.process.poll() is None:
            self.kill()
        for path in [SHARED_MEMORY / name for name in self.segments()]:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def start(folder: Path, *options: str, prefix: str | None = None, wrapper: Sequence[str] = ()) -> RunningDaemon:
    """Start a daemon and wait until it serves; its segments' names start with a prefix of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = prefix or f"/stagingd-test-{uuid.uuid4().hex[:12]}-"
    command = [sys.executable, "-m", "stagingd", "serve", "--runtime-dir", str(folder), "--segment-prefix", prefix]
    with (folder / "daemon.log").open("wb") as log:
        process = subprocess.Popen([*wrapper, *command, "--no-lock-memory", *options], stderr=log)
    daemon = RunningDaemon(folder, prefix, process, options, tuple(wrapper))
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            daemon.status()
        except DaemonUnreachable:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the daemon does not serve:\n{daemon.log}") from None
            time.sleep(0.02)  # a process of our own starts; there is nothing to be told by
        except StagingError:
            return daemon  # it serves, though not us
        else:
            return daemon


@contextmanager
def serving(folder: Path, *options: str, wrapper: Sequence[str] = ()) -> Iterator[RunningDaemon]:
    """A daemon with options of its own, of which nothing is left at the end."""
    daemon = start(folder, *options, wrapper=wrapper)
    try:
        yield daemon
    finally:
        daemon.clear()


_PUPPET = """
import json, os, sys, traceback
from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import StagingError
exec(sys.argv[1])
user = json.loads(sys.argv[2])
if user is not None:  # only now: the interpreter may lie where this user cannot read
    os.setgroups(user["groups"])
    os.setresgid(*[user["gid"]] * 3)
    os.setresuid(*[user["uid"]] * 3)

def obey(code):
    try:
        compiled = compile(code, "told", "eval")
    except SyntaxError:
        return exec(code, globals())
    return eval(compiled, globals())

print(json.dumps({"value": "ready"}), flush=True)
for line in sys.stdin:
    try:
        value = obey(json.loads(line))
        said = {"value": value if isinstance(value, int | float | str | list | None) else str(value)}
    except StagingError as error:
        said = {"refusal": [error.code, error.what, error.remedy]}
    except Exception:
        said = {"failure": traceback.format_exc()}
    print(json.dumps(said), flush=True)
os._exit(0)
"""


class Puppet:
    """A client in a process of its own that executes, line by line, what the test tells it.

    Args:
        imports: what else it shall import; ``wire``, ``Connection`` and ``StagingError`` it knows.
        wrapper: a command that starts it.
        user: ``uid``, ``gid`` and ``groups`` that it takes on, if not those of the tests.
    """

    def __init__(self, imports: str = "", *, wrapper: Sequence[str] = (), user: dict[str, Any] | None = None) -> None:
        command = [*wrapper, sys.executable, "-c", _PUPPET, imports, json.dumps(user)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._wrapper = wrapper
        self._pid: int | None = None
        self._begun = True  # it says that it is ready

    @property
    def pid(self) -> int:
        """Its number, as the tests see it."""
        if self._pid is None:
            self._wait_until_ready()
            self._pid = _inside(self.process, self._wrapper)
        return self._pid

    def _wait_until_ready(self) -> None:
        if self._begun:
            self._begun = False
            assert self.answer() == "ready"

    def tell(self, code: str) -> None:
        """Have something done, and do not wait for it."""
        self._wait_until_ready()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """What came of the oldest thing told. Raises what it raised, where that is one of our errors."""
        assert self.process.stdout is not None
        watch = select.poll()
        watch.register(self.process.stdout, select.POLLIN)
        assert watch.poll(DEADLINE_S * 1000), "the client says nothing"
        said = json.loads(self.process.stdout.readline() or b'{"failure": "the client has ended"}')
        assert "failure" not in said, said["failure"]
        if "refusal" in said:
            raise from_code(*said["refusal"], {})
        return said["value"]

    def do(self, code: str) -> Any:
        """Have it done, and wait."""
        self.tell(code)
        return self.answer()

    def kill(self) -> None:
        """End it, without a goodbye; returns when the kernel has taken it away."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait(DEADLINE_S)

    def __enter__(self) -> Puppet:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # also a stopped one, and one that never was ready
        self.process.communicate(timeout=DEADLINE_S)
