# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Mounted file systems, from /proc/PID/mountinfo: see proc_pid_mountinfo(5)."""

from __future__ import annotations

from stagingd.machine.files import Files
from stagingd.record import Record


class Mount(Record):
    """One mounted file system.

    Attributes:
        root: which folder of the file system is mounted.
        point: where.
        kind: tmpfs, cgroup2 and the like.
        options: of the mount and of the file system, such as ``ro`` and ``size=65536k``.
    """

    root: str
    point: str
    kind: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """The value of an option such as ``huge=always``."""
        return next((o.partition("=")[2] for o in self.options if o.startswith(f"{name}=")), None)


def read_mounts(files: Files) -> list[Mount]:
    """What this process sees mounted, in the order in which it was."""
    return [_mount(line) for line in files.lines("proc/self/mountinfo")]


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    _, _, _, root, point, options, *_ = before.split()
    kind, *_, whole = after.split()
    return Mount(
        root=_plain(root), point=_plain(point), kind=kind, options=tuple(options.split(",")) + tuple(whole.split(","))
    )


def _plain(path: str) -> str:
    return path.replace("\\040", " ")


def mounted_at(mounts: list[Mount], point: str) -> Mount | None:
    """The file system that is seen at a mount point: the last of those mounted there."""
    return next((mount for mount in reversed(mounts) if mount.point == point), None)
