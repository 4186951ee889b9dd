# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Whose limits count: those of the daemon that serves, or of the one that would be started from here."""

from __future__ import annotations

import enum
import os
import pwd
import re
from typing import Final

from stagingd.machine.cgroups import read_groups
from stagingd.machine.files import Files, numbers
from stagingd.memory import may_lock_anything
from stagingd.record import Record

INITIAL_PIDS: Final = "pid:[4026531836]"
"""The host's pid namespace: its number is fixed in the kernel (PROC_PID_INIT_INO)."""

_INITIAL: Final = {"pid": INITIAL_PIDS, "uts": "uts:[4026531838]", "ipc": "ipc:[4026531839]"}
"""Further ones of that kind. A container has another of at least one of them, also with --pid=host and --ipc=host."""

_CONTAINER_MARKS: Final = (".dockerenv", "run/.containerenv")
_POD_MARK: Final = "var/run/secrets/kubernetes.io"
_CONTAINER_GROUPS: Final = re.compile(r"docker|libpod|containerd|crio|lxc")


class Place(enum.StrEnum):
    """What started the process, and so where its limits are set."""

    SHELL = "shell"
    UNIT = "unit"
    CONTAINER = "container"
    POD = "pod"


class Subject(Record):
    """One process.

    Attributes:
        serving: its pid, if it is a daemon that serves.
        user: who looks.
        place: what started it.
        unit: the systemd unit that it belongs to.
        lock_soft, lock_hard: the limit on locked memory in bytes; None is no limit.
        locks_anything: whether it has CAP_IPC_LOCK, to which that limit does not apply.
        locked: bytes that it has locked.
        descriptors: the hard limit on open files, to which a daemon raises its own.
        cpus, memory_nodes: the processors that it may run on, and the NUMA nodes that it may have memory of.
        groups: its control group by controller; the unified hierarchy has the empty name.
        pid_namespace: as /proc names it; None where that is not told.
    """

    serving: int | None
    user: str
    place: Place
    unit: str | None
    lock_soft: int | None
    lock_hard: int | None
    locks_anything: bool
    locked: int
    descriptors: int | None
    cpus: tuple[int, ...]
    memory_nodes: tuple[int, ...]
    groups: dict[str, str]
    pid_namespace: str | None

    @property
    def who(self) -> str:
        """For people."""
        return f"the daemon (pid {self.serving})" if self.serving else "a daemon started from here"


def read_subject(files: Files, serving: int | None) -> Subject:
    """Read a process.

    Args:
        files: where.
        serving: the pid of the daemon that serves; None for this process, whose limits a daemon would inherit. So it
            is with one that cannot be seen from here, too.
    """
    serving = serving if files.exists(f"proc/{serving}/limits") else None
    folder = f"proc/{serving or 'self'}"
    soft, hard = _limit(files, folder, "Max locked memory")
    groups = read_groups(files, folder)
    unit = _unit(groups)
    status = dict(line.split(":", 1) for line in files.lines(f"{folder}/status") if ":" in line)
    return Subject(
        serving=serving,
        user=user_name(),
        place=_place(files, groups, unit),
        unit=unit,
        lock_soft=soft,
        lock_hard=hard,
        locks_anything=bool(status) and may_lock_anything(files.root / folder),
        locked=int(status.get("VmLck", "0").split()[0]) * 1024,
        descriptors=_limit(files, folder, "Max open files")[1],
        cpus=numbers(status.get("Cpus_allowed_list", "")),
        memory_nodes=numbers(status.get("Mems_allowed_list", "")),
        groups=groups,
        pid_namespace=files.link(f"{folder}/ns/pid"),
    )


def user_name() -> str:
    """This process's user; the number of one whom a container does not know by name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _limit(files: Files, folder: str, name: str) -> tuple[int | None, int | None]:
    """The soft and the hard limit of a name, see proc_pid_limits(5)."""
    found = re.search(rf"^{name} +(\S+) +(\S+)", files.text(f"{folder}/limits") or "", re.MULTILINE)
    if found is None:
        return None, None
    soft, hard = (None if value == "unlimited" else int(value) for value in found.groups())
    return soft, hard


def _unit(groups: dict[str, str]) -> str | None:
    path = groups.get("", groups.get("name=systemd", ""))
    last = path.rstrip("/").rpartition("/")[2]
    return last if last.endswith(".service") and not last.startswith("user@") else None


def _place(files: Files, groups: dict[str, str], unit: str | None) -> Place:
    path = groups.get("memory", groups.get("", ""))
    if files.exists(_POD_MARK) or "kubepods" in path:
        return Place.POD
    if _CONTAINER_GROUPS.search(path) or (any(map(files.exists, _CONTAINER_MARKS)) and _apart(files)):
        return Place.CONTAINER
    return Place.UNIT if unit else Place.SHELL


def _apart(files: Files) -> bool:
    """Apart from the host? A virtual machine made from a container's image has the marks too."""
    return any(files.link(f"proc/self/ns/{kind}") != initial for kind, initial in _INITIAL.items())
