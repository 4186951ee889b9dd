# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Does a daemon answer at the socket, and does it serve this user?"""

from __future__ import annotations

import enum
import os
import socket
import struct
from pathlib import Path

from stagingd import wire
from stagingd.connection import ANSWER_S, Connection
from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.subject import user_name
from stagingd.doctor.wanted import size_text
from stagingd.errors import DaemonUnreachable, PeerNotAdmitted, PeerNotVisible, SocketNotTrusted, StagingError
from stagingd.link import check_listening, check_trusted
from stagingd.record import Record

CHECK = "daemon"


class State(enum.StrEnum):
    """What is at the control socket."""

    ABSENT = "absent"
    HIDDEN = "hidden"
    LEFT = "left"
    FOREIGN = "foreign"
    REFUSES = "refuses"
    UNSEEN = "unseen"
    SILENT = "silent"
    SERVES = "serves"


class Served(Record):
    """A stage: its name, its segment's name, and the segment's bytes."""

    name: str
    segment: str
    bytes: int


class Answer(Record):
    """What came of asking.

    Attributes:
        path: the control socket.
        state: what is there.
        what: the refusal, in its own words.
        pid: the daemon's, as this process sees it; None where it does not.
        uptime_s: since when it serves.
        stages: what it serves.
    """

    path: str
    state: State
    what: str = ""
    pid: int | None = None
    uptime_s: float = 0.0
    stages: tuple[Served, ...] = ()

    @property
    def out_of_sight(self) -> bool:
        """Whether a daemon serves whose process this one does not see."""
        return self.state is State.SERVES and self.pid is None


def ask(path: Path) -> Answer:
    """Ask for the status, as a client would. Takes seconds where a daemon listens and does not answer."""
    try:
        check_trusted(path)
    except SocketNotTrusted as error:
        return Answer(path=str(path), state=State.FOREIGN, what=error.what)
    except DaemonUnreachable as error:
        hidden = isinstance(error.__cause__, PermissionError)
        return Answer(path=str(path), state=State.HIDDEN if hidden else State.ABSENT, what=error.what)
    try:
        check_listening(path)
    except DaemonUnreachable as error:
        refused = isinstance(error.__cause__, ConnectionRefusedError)
        return Answer(path=str(path), state=State.LEFT if refused else State.HIDDEN, what=error.what)
    return _ask(path)


def _ask(path: Path) -> Answer:
    try:
        with Connection(path, name="stagingd doctor") as connection:
            report = connection.request(wire.Status(), wire.StatusReport)
    except PeerNotVisible as error:
        return Answer(path=str(path), state=State.UNSEEN, what=error.what)
    except PeerNotAdmitted as error:
        return Answer(path=str(path), state=State.REFUSES, what=error.what)
    except StagingError as error:
        return Answer(path=str(path), state=State.SILENT, what=error.what, pid=_listener(path))
    stages = tuple(Served(name=s.stage, segment=s.segment, bytes=s.segment_bytes) for s in report.stages)
    return Answer(path=str(path), state=State.SERVES, pid=_listener(path), uptime_s=report.uptime_s, stages=stages)


def _listener(path: Path) -> int | None:
    """The pid of who listens, by the kernel's word: the daemon's own may be of another pid namespace."""
    with socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(ANSWER_S)
        try:
            trial.connect(str(path))
        except OSError:
            return None  # it has ended since
        pid: int = struct.unpack("3i", trial.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid or None


def judge_answer(answer: Answer, group: str | None) -> Finding:
    """Whether a client of this user is served.

    Args:
        answer: what came of asking.
        group: whom the folder of the sockets is open to.
    """
    if answer.state is State.SERVES:
        count = "no stages" if not answer.stages else f"stages: {', '.join(map(_stage, answer.stages))}"
        pid = f"pid {answer.pid}" if answer.pid else "a process that is not seen from here"
        up = f"up {answer.uptime_s:.0f} s"
        return ok(CHECK, f"{pid} serves {answer.path}, {up}, {count}")
    if answer.state in (State.ABSENT, State.LEFT):
        return Finding(
            check=CHECK,
            level=Level.NOTE,
            found=answer.what,
            costs="trainers and engines find no stage; all else here is about a daemon started from here",
            remedies=(
                Remedy(where="in this shell", do="stagingd serve"),
                Remedy(where="as a service", do="systemctl enable --now stagingd"),
                Remedy(where="if it serves another folder", do="stagingd doctor --runtime-dir DIR"),
            ),
        )
    if answer.state is State.SILENT:
        return _judge_silence(answer)
    costs = "clients of this user are refused: trainers cannot declare, and engines cannot attach"
    remedies = own_pids() if answer.state is State.UNSEEN else _admitted(group)
    return Finding(check=CHECK, level=Level.ERROR, found=answer.what, costs=costs, remedies=remedies)


def _judge_silence(answer: Answer) -> Finding:
    pid = str(answer.pid or "PID")
    return Finding(
        check=CHECK,
        level=Level.ERROR,
        found=answer.what,
        costs="trainers and engines wait until their deadlines, and fail",
        remedies=(
            Remedy(where="if it was stopped", do=f"kill -CONT {pid}"),
            Remedy(where="to see what it does", do=f"ps -o pid,stat,wchan,etime,args -p {pid}"),
            Remedy(where="to replace it; no version is lost", do=f"kill -KILL {pid}; stagingd serve"),
        ),
    )


def _stage(stage: Served) -> str:
    return f"{stage.name} ({size_text(stage.bytes) if stage.segment else 'not yet declared'})"


def _admitted(group: str | None) -> tuple[Remedy, ...]:
    member = f"usermod --append --groups {group or 'stagingd'} {user_name()}"
    return (
        Remedy(where="as root, then log in anew; the daemon has to run with that --group", do=member),
        Remedy(where="or a daemon of one's own", do=f"stagingd serve --runtime-dir /tmp/stagingd-{os.getuid()}"),
    )


def own_pids() -> tuple[Remedy, ...]:
    """How a client and a daemon see each other's processes."""
    return (
        Remedy(where="docker run", do="--pid=host"),
        Remedy(where="in the pod's specification", do="hostPID: true"),
        Remedy(where="where that cannot be, in the daemon's settings", do="STAGINGD_HEARTBEAT_S=30"),
    )
