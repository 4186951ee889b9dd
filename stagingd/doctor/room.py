# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Is there room for two versions: in the machine, in /dev/shm, and under the limits of a container?"""

from __future__ import annotations

import math
import os

from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.subject import Place, Subject
from stagingd.doctor.wanted import Wanted, largest_version, size_text
from stagingd.machine.cgroups import GroupLimit
from stagingd.machine.files import Files
from stagingd.record import Record

MEMORY, SHARED, GROUP = "room in memory", "room in /dev/shm", "memory limit"

CONTAINER_SHM_BYTES = 64 * 2**20
"""What container runtimes give /dev/shm when they are not told otherwise."""

_HALF = Remedy(where="in the trainers, for half the bytes", do='Stage.open("policy", quantization="policy.json")')


class SharedMemory(Record):
    """The file system of POSIX shared memory, in bytes."""

    total: int
    free: int


class Room(Record):
    """What there is room for, in bytes.

    Attributes:
        available: what the kernel says can be had without swapping; None where it does not say.
        shared_memory: /dev/shm; None where there is none.
    """

    available: int | None
    shared_memory: SharedMemory | None


def read_room(files: Files) -> Room:
    """Read what is free now; what stages that stand already use is not."""
    return Room(
        available=read_meminfo(files).get("MemAvailable"),
        shared_memory=_shared_memory(files),
    )


def read_meminfo(files: Files) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    fields = (line.replace(":", " ").split() for line in files.lines("proc/meminfo"))
    return {name: int(value) * 1024 for name, value, *_ in fields}


def _shared_memory(files: Files) -> SharedMemory | None:
    try:
        found = os.statvfs(files.root / "dev/shm")
    except OSError:
        return None
    return SharedMemory(total=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)


def judge_room(room: Room, subject: Subject, wanted: Wanted) -> list[Finding]:
    """Each of them against two versions."""
    return [_judge_memory(room.available, wanted), _judge_shared(room.shared_memory, subject, wanted)]


def _judge_memory(available: int | None, wanted: Wanted) -> Finding:
    if available is None:
        return ok(MEMORY, "the kernel does not say how much memory is available; the other limits count")
    if available >= wanted.stage_bytes:
        return ok(MEMORY, f"{size_text(available)} available; {wanted}, which leaves {_left(available, wanted)}")
    return Finding(
        check=MEMORY,
        level=Level.ERROR,
        found=f"{size_text(available)} available, which is room for two of {_largest(available)}; {wanted}",
        costs="the daemon refuses the stage when trainers declare it",
        remedies=(
            Remedy(where="to see who has the memory", do="ps -eo rss,pid,user,args --sort=-rss | head"),
            Remedy(where="to give stages back that nobody uses", do="stagingd drop NAME"),
            *((_HALF,) if available >= wanted.stage_bytes / 2 else ()),
        ),
    )


def _judge_shared(shared: SharedMemory | None, subject: Subject, wanted: Wanted) -> Finding:
    if shared is None:
        return Finding(
            check=SHARED,
            level=Level.ERROR,
            found="there is no /dev/shm",
            costs="no stage can be made",
            remedies=(Remedy(where="as root", do="mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm"),),
        )
    of = f"{size_text(shared.free)} free of {size_text(shared.total)}"
    if shared.free >= wanted.stage_bytes:
        return ok(SHARED, f"{of}; {wanted}, which leaves {_left(shared.free, wanted)}")
    usual = ", the usual size in a container" if shared.total == CONTAINER_SHM_BYTES else ""
    return Finding(
        check=SHARED,
        level=Level.ERROR,
        found=f"{of}{usual}, which is room for two of {_largest(shared.free)}; {wanted}",
        costs="the daemon refuses the stage when trainers declare it",
        remedies=_enlarge(shared, subject, wanted),
    )


def _enlarge(shared: SharedMemory, subject: Subject, wanted: Wanted) -> tuple[Remedy, ...]:
    size = _whole_gib(shared.total - shared.free + wanted.stage_bytes)
    if subject.place is Place.POD:
        volume = f"volumes: [{{name: shm, emptyDir: {{medium: Memory, sizeLimit: {size}Gi}}}}]"
        mount = "volumeMounts: [{name: shm, mountPath: /dev/shm}]"
        return (Remedy(where="in the pod's specification", do=f"{volume}\n{mount}  # at the container"),)
    if subject.place is Place.CONTAINER or shared.total == CONTAINER_SHM_BYTES:
        return (
            Remedy(where="docker run, where clients are in other containers or on the host", do="--ipc=host"),
            Remedy(where="docker run, where all are in this one", do=f"--shm-size={size}g"),
        )
    return (
        Remedy(where="as root, until the next boot", do=f"mount -o remount,size={size}g /dev/shm"),
        Remedy(where="for ever, a line of /etc/fstab", do=f"tmpfs /dev/shm tmpfs nosuid,nodev,size={size}g 0 0"),
        Remedy(where="to give stages back that nobody uses", do="stagingd drop NAME"),
    )


def judge_group_limit(group: GroupLimit | None, subject: Subject, wanted: Wanted) -> Finding:
    """The limit of control groups against two versions.

    Args:
        group: the tightest of those that the process is in.
        subject: the process.
        wanted: the two versions.
    """
    if group is None:
        return ok(GROUP, f"no control group of {subject.who} limits its memory")
    of = f"{size_text(group.room)} left of the {size_text(group.limit)} of {group.file}"
    if group.room >= wanted.stage_bytes:
        return ok(GROUP, f"{of}; {wanted}, which leaves {_left(group.room, wanted)}")
    return Finding(
        check=GROUP,
        level=Level.ERROR,
        found=f"{of}, which is room for two of {_largest(group.room)}; {wanted}",
        costs="the daemon refuses the stage when trainers declare it: shared memory counts to who makes it",
        remedies=_raise_group(group, subject, wanted),
    )


def _raise_group(group: GroupLimit, subject: Subject, wanted: Wanted) -> tuple[Remedy, ...]:
    size = _whole_gib(group.used - group.reclaimable + wanted.stage_bytes)
    if subject.place is Place.POD:
        limits = f"resources: {{limits: {{memory: {size}Gi}}}}"
        return (Remedy(where="in the pod's specification, at the container", do=limits),)
    if subject.place is Place.CONTAINER:
        return (Remedy(where="docker run, podman run", do=f"--memory={size}g"),)
    if subject.place is Place.UNIT:
        # MemoryMax= would count shared memory, so the unit has none: whoever added it takes it out again.
        return (Remedy(where="as root", do=f"systemctl set-property {subject.unit} MemoryMax=infinity"),)
    return (Remedy(where="as root", do=f"echo {size * 2**30} > {group.file}"),)


def _largest(room: int) -> str:
    return size_text(largest_version(room))


def _left(room: int, wanted: Wanted) -> str:
    return size_text(room - wanted.stage_bytes)


def _whole_gib(size: int) -> int:
    return math.ceil(size / 2**30)
