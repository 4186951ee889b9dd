# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Memory limits of the control groups that a process is in: those of a container, or of a systemd unit.

See the kernel's admin-guide/cgroup-v2.rst, and admin-guide/cgroup-v1/memory.rst for the older hierarchy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from stagingd.machine.files import Files
from stagingd.machine.mounts import Mount
from stagingd.record import Record

_NO_LIMIT: Final = 2**62
"""Version 1 says it by the largest number of pages."""


class GroupLimit(Record):
    """The limit of one control group, in bytes.

    Attributes:
        file: where the limit is set.
        limit: most that it may use.
        used: what it uses.
        reclaimable: how much of that are cached files, which the kernel gives up first.
    """

    file: str
    limit: int
    used: int
    reclaimable: int

    @property
    def room(self) -> int:
        """What is left."""
        return max(0, self.limit - self.used + self.reclaimable)


def read_groups(files: Files, process: str = "proc/self") -> dict[str, str]:
    """A process's group by controller, see proc_pid_cgroup(5).

    A line has the hierarchy's number, its controllers, and the path in it; version 2 names no controllers.
    """
    found: dict[str, str] = {}
    for line in files.lines(f"{process}/cgroup"):
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def tightest_limit(files: Files, mounts: list[Mount], groups: dict[str, str]) -> GroupLimit | None:
    """The limit with the least room, of a process's group and all groups around it; None where there is none.

    Args:
        files: where.
        mounts: what is mounted.
        groups: the process's group by controller.
    """
    limits = [limit for mount in mounts for limit in _limits(files, mount, groups)]
    return min(limits, key=lambda limit: limit.room, default=None)


def _limits(files: Files, mount: Mount, groups: dict[str, str]) -> Iterator[GroupLimit]:
    if mount.kind == "cgroup2":
        names, path, prefix = ("memory.max", "memory.current"), groups.get(""), ""
    elif mount.kind == "cgroup" and "memory" in mount.options:
        names, path, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), groups.get("memory"), "total_"
    else:
        return
    for folder in _upwards(mount, path or "/"):
        limit = files.number(f"{folder}/{names[0]}")
        used = files.number(f"{folder}/{names[1]}")
        if limit is not None and used is not None and limit < _NO_LIMIT:
            cached = _cached(files, folder, prefix)
            yield GroupLimit(file=f"/{folder}/{names[0]}", limit=limit, used=used, reclaimable=cached)


def _upwards(mount: Mount, path: str) -> Iterator[str]:
    """The group's folder and those around it. A container may see its own group as the root of what is mounted."""
    point = PurePosixPath(mount.point).relative_to("/")
    inside = PurePosixPath(path)
    below = inside.relative_to(mount.root) if inside.is_relative_to(mount.root) else PurePosixPath()
    for part in (below, *below.parents):
        yield str(point / part)


def _cached(files: Files, folder: str, prefix: str) -> int:
    """Of files on disk; shared memory, which nothing gives up, is not among them."""
    wanted = {f"{prefix}inactive_file", f"{prefix}active_file"}
    lines = (line.split() for line in files.lines(f"{folder}/memory.stat"))
    return sum(int(value) for key, value in lines if key in wanted)
