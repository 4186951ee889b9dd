# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Physical memory: is there room for a segment, and may it be locked?"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from pathlib import Path
from typing import Final

import psutil

from stagingd.errors import NotEnoughMemory
from stagingd.machine.cgroups import read_groups, tightest_limit
from stagingd.machine.files import Files
from stagingd.machine.mounts import read_mounts

MACHINE: Final = Files()


def check_room(stage: str, size: int, shared_memory: Path, *, lock: bool, files: Files = MACHINE) -> None:
    """Refuse a segment that cannot be had, before anything is allocated. Raises NotEnoughMemory.

    Args:
        stage: whose it is.
        size: in bytes.
        shared_memory: the file system that it would be in.
        lock: whether it would be locked.
        files: what the kernel says of this process.
    """
    shm = os.statvfs(shared_memory)
    limits = {
        "free in /dev/shm": (shm.f_bavail * shm.f_frsize, "enlarge /dev/shm (in a container: --shm-size)"),
        "of available memory": (psutil.virtual_memory().available, "use a machine with more memory"),
    }
    group = tightest_limit(files, read_mounts(files), read_groups(files))
    if group is not None:  # shared memory counts to who makes it, and the kernel kills whoever exceeds its limit
        remedy = "raise the memory limit of the container or unit (stagingd doctor says how)"
        limits[f"left of the {gib(group.limit)} of {group.file}"] = (group.room, remedy)
    if lock and (lockable := _lockable_bytes()) is not None:
        remedy = "raise the memory-locking limit (ulimit -l, LimitMEMLOCK=), or set STAGINGD_LOCK_MEMORY=false"
        limits["may be locked"] = (lockable, remedy)
    for what, (room, remedy) in limits.items():
        if size > room:
            raise NotEnoughMemory(
                f"stage {stage!r} needs {gib(size)} for two versions, but {gib(room)} {what}",
                remedy=f"{remedy}, or stage fewer tensors",
                stage=stage,
            )


def check_lockable(stage: str, size: int) -> None:
    """Refuse to lock more than the limit allows, before anything is tried. Raises NotEnoughMemory."""
    lockable = _lockable_bytes()
    if lockable is not None and size > lockable:
        raise NotEnoughMemory(
            f"stage {stage!r} has {gib(size)}, but {gib(lockable)} may be locked",
            remedy="raise the memory-locking limit (ulimit -l, LimitMEMLOCK=), or set STAGINGD_LOCK_MEMORY=false",
            stage=stage,
        )


def _lockable_bytes() -> int | None:
    """The limit on locked memory; None where there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or may_lock_anything() else soft


def may_lock_anything(process: Path = Path("/proc/self")) -> bool:
    """Whether a process, given by its folder in /proc, has CAP_IPC_LOCK, to which the locking limit does not apply."""
    status = (process / "status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> 14 & 1)


def lock_pages(mapping: mmap.mmap, stage: str) -> None:
    """Keep a mapping in physical memory (mlock). Raises NotEnoughMemory when the limit forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
    failed = libc.mlock(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapping)))
    number = ctypes.get_errno()
    size = len(mapping)
    del view  # or the mapping could never be closed
    if failed:
        raise NotEnoughMemory(
            f"stage {stage!r} cannot lock {gib(size)}: {os.strerror(number)}",
            remedy="raise the memory-locking limit (ulimit -l, LimitMEMLOCK=), or set STAGINGD_LOCK_MEMORY=false",
            stage=stage,
        )


def gib(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / 2**30:.3f} GiB"
