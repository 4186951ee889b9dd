# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""/dev/shm: may segments be made in it, and what lies there under the daemon's prefix?"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from typing import Final

from stagingd.config import Settings
from stagingd.doctor.access import Entry, read_entry
from stagingd.doctor.answer import Answer
from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.wanted import size_text
from stagingd.machine.files import Files
from stagingd.machine.mounts import Mount, mounted_at
from stagingd.record import Record

FOLDER, SEGMENTS = "/dev/shm", "segments"

_MOUNT: Final = Remedy(where="as root", do="mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm")


class Shared(Record):
    """What is in /dev/shm.

    Attributes:
        folder: itself; None where it does not exist.
        kind: which kind of file system is mounted there; None where none is.
        names: of all that is in it.
        segments: what has the daemon's prefix.
        held: the inodes that some process has locked as its own.
    """

    folder: Entry | None
    kind: str | None
    names: frozenset[str]
    segments: tuple[Entry, ...]
    held: frozenset[int]


def read_shared(files: Files, mounts: Sequence[Mount], settings: Settings) -> Shared:
    """Read it."""
    path, prefix = files.root / "dev/shm", settings.segment_prefix.lstrip("/")
    mount = mounted_at(list(mounts), "/dev/shm")
    names = files.names("dev/shm")
    found = [read_entry(path / name, follow=False) for name in names if name.startswith(prefix)]
    return Shared(
        folder=read_entry(path, follow=True),
        kind=mount.kind if mount else None,
        names=frozenset(names),
        segments=tuple(entry for entry in found if entry is not None),
        held=frozenset(_held(files)),
    )


def _held(files: Files) -> list[int]:
    """Inodes of files that somebody holds by flock, see proc_locks(5)."""
    fields = (line.split() for line in files.lines("proc/locks"))
    return [int(field[5].rpartition(":")[2]) for field in fields if field[1] == "FLOCK"]


def judge_shared(shared: Shared) -> Finding:
    """Whether segments can be made."""
    folder = shared.folder
    if folder is None or not stat.S_ISDIR(folder.mode):
        return _refused("there is no folder /dev/shm", _MOUNT)
    if not folder.writable:
        again = Remedy(where="as root", do="mount -o remount,rw /dev/shm && chmod 1777 /dev/shm")
        return _refused(f"{folder.shown}, and it cannot be written to from here", again)
    if shared.kind not in (None, "tmpfs", "ramfs"):
        return _refused(f"/dev/shm is of kind {shared.kind}, not tmpfs: segments would lie on a disk", _MOUNT)
    if folder.mode & stat.S_IWOTH and not folder.mode & stat.S_ISVTX:
        return Finding(
            check=FOLDER,
            level=Level.WARNING,
            found=f"{folder.shown}, without the sticky bit",
            costs="every user may remove the daemon's segments, and put others in their place",
            remedies=(Remedy(where="as root", do="chmod 1777 /dev/shm"),),
        )
    return ok(FOLDER, f"{folder.shown}: segments can be made")


def _refused(found: str, remedy: Remedy) -> Finding:
    costs = "the daemon cannot make a stage's memory"
    return Finding(check=FOLDER, level=Level.ERROR, found=found, costs=costs, remedies=(remedy,))


def judge_served(shared: Shared, answer: Answer) -> Finding:
    """Whether the segments of the daemon that serves are to be found here, and not in another container's /dev/shm."""
    declared = [stage.segment for stage in answer.stages if stage.segment]
    missing = [name for name in declared if name.lstrip("/") not in shared.names]
    if not missing:
        return ok(SEGMENTS, f"{len(declared)} of the daemon that serves, all of which are here")
    return Finding(
        check=SEGMENTS,
        level=Level.ERROR,
        found=f"the daemon serves {', '.join(missing)}, but this is not in the /dev/shm that is seen from here",
        costs="trainers and engines here cannot map it: the daemon has a /dev/shm of its own, of another container",
        remedies=(
            Remedy(where="docker run, here and for the daemon", do="--ipc=host"),
            Remedy(where="or for both", do="--volume /dev/shm:/dev/shm"),
            Remedy(where="in the specification of both pods", do="hostIPC: true"),
        ),
    )


def judge_segments(shared: Shared, settings: Settings, uid: int) -> Finding:
    """Whose the segments under the prefix are that a daemon started from here would have.

    Args:
        shared: what is there.
        settings: the daemon's.
        uid: the user who would start it.
    """
    prefix = settings.segment_prefix
    other = Remedy(where="to have names of its own", do="STAGINGD_SEGMENT_PREFIX=/NAME-")
    foreign = [one for one in shared.segments if one.uid != uid or not stat.S_ISREG(one.mode)]
    if foreign:
        look = Remedy(where="to see whose they are", do=f"ls -l {' '.join(one.path for one in foreign)}")
        return _taken(f"{_named(foreign)} belong to another user", (look, other))
    held = [one for one in shared.segments if one.inode in shared.held]
    if held:
        who = Remedy(where="to see which daemon has them", do=f"fuser -v {held[0].path}")
        return _taken(f"{_named(held)} are in use by a daemon that does not serve this folder", (who, other))
    if not shared.segments:
        return ok(SEGMENTS, f"none of {prefix}* is left from a daemon that ended")
    size = size_text(sum(one.size for one in shared.segments))
    return Finding(
        check=SEGMENTS,
        level=Level.NOTE,
        found=f"{_named(shared.segments)}, {size}, are left from a daemon that ended",
        costs=f"{size} of memory, until the next daemon has adopted them: their versions are not lost",
        remedies=(
            Remedy(where="to go on with them", do="stagingd serve"),
            Remedy(where="and then, for each stage that nobody needs", do="stagingd drop NAME"),
        ),
    )


def _taken(found: str, remedies: tuple[Remedy, ...]) -> Finding:
    costs = "stages of these names are refused"
    return Finding(check=SEGMENTS, level=Level.WARNING, found=found, costs=costs, remedies=remedies)


def _named(segments: Sequence[Entry]) -> str:
    first = ", ".join(one.path for one in segments[:3])
    return f"{first} and {len(segments) - 3} more" if len(segments) > 3 else first
