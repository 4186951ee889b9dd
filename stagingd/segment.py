# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A stage's shared memory: a superblock, the catalog and two slots in one POSIX segment.

    0            superblock: magic, format, sizes, checksum of the catalog
    4096         the catalog, as msgpack
    header_bytes slot 0: tensors, then their moments
    + slot_bytes slot 1

The daemon creates segments and removes them; clients map them. Memory is allocated when the segment
is made, so that a machine that runs out says so then and there, and never by SIGBUS later.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgpack
import posix_ipc
import psutil

from stagingd.catalog import Catalog
from stagingd.errors import NotEnoughMemory, SegmentTaken, SegmentUnreadable, SegmentUnusable
from stagingd.moments import StoredMoments, stored_bytes

MAGIC: Final = b"STAGINGD"
FORMAT: Final = 1
PAGE: Final = mmap.PAGESIZE
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX segments, not a temporary folder
_SUPERBLOCK: Final = struct.Struct("<8sIIQQQQI")
"""magic, format, daemon's pid, header bytes, catalog bytes, slot bytes, segment bytes, catalog's CRC-32"""


@dataclass(frozen=True)
class Superblock:
    """The first bytes of a segment."""

    pid: int
    header_bytes: int
    catalog_bytes: int
    slot_bytes: int
    catalog_checksum: int

    @property
    def segment_bytes(self) -> int:
        """Size of the whole segment."""
        return self.header_bytes + 2 * self.slot_bytes

    def pack(self) -> bytes:
        """As it stands in the segment."""
        sizes = (self.header_bytes, self.catalog_bytes, self.slot_bytes, self.segment_bytes)
        return _SUPERBLOCK.pack(MAGIC, FORMAT, self.pid, *sizes, self.catalog_checksum)

    @classmethod
    def unpack(cls, name: str, data: bytes) -> Superblock:
        """Read it. Raises SegmentUnreadable when it is not ours, or of another format."""
        if len(data) < _SUPERBLOCK.size or data[: len(MAGIC)] != MAGIC:
            raise SegmentUnreadable(
                f"segment {name} was not made by stagingd", remedy="remove it, or use another segment_prefix"
            )
        _, fmt, pid, header, catalog, slot, _, checksum = _SUPERBLOCK.unpack_from(data)
        if fmt != FORMAT:
            raise SegmentUnreadable(
                f"segment {name} has format {fmt}, this stagingd reads format {FORMAT}",
                remedy="use the same version of stagingd everywhere",
            )
        return cls(pid, header, catalog, slot, checksum)


class Segment:
    """A mapped segment. Use ``create`` in the daemon, ``open_existing`` in a client; close it when done.

    Attributes:
        name: the POSIX name, with its leading slash.
        catalog: what is where.
        size: bytes in all.
    """

    def __init__(self, name: str, mapping: mmap.mmap, catalog: Catalog, superblock: Superblock) -> None:
        self.name = name
        self.catalog = catalog
        self.size = superblock.segment_bytes
        self._superblock = superblock
        self._mapping = mapping

    def slot(self, index: int) -> memoryview:
        """The bytes of slot 0 or 1."""
        start = self._superblock.header_bytes + index * self._superblock.slot_bytes
        return memoryview(self._mapping)[start : start + self.catalog.slot_bytes]

    def moments(self, index: int) -> StoredMoments:
        """The moments of slot 0 or 1."""
        at, cells = self.catalog.moments_offset, self.catalog.cells
        return StoredMoments(self.slot(index)[at : at + stored_bytes(cells)], cells)

    def close(self) -> None:
        """Unmap the segment; it stays until the daemon removes it.

        Views that are still in use keep the mapping alive: it goes with the last of them.
        """
        try:
            self._mapping.close()
        except BufferError:
            return

    def unlink(self) -> None:
        """Remove the segment's name; the memory goes when the last process has unmapped it."""
        try:
            posix_ipc.unlink_shared_memory(self.name)
        except posix_ipc.ExistentialError:
            return


def create(name: str, catalog: Catalog, *, lock: bool, mode: int = 0o600, group: int = -1) -> Segment:
    """Make, allocate and, if ``lock``, page-lock a segment for a catalog.

    Args:
        name: its POSIX name.
        catalog: what it will hold.
        lock: keep it in physical memory (mlock).
        mode: permission bits.
        group: the Unix group's number, or -1 for the process's own.

    Raises:
        NotEnoughMemory: there is no room for two slots, or no permission to lock them. Nothing is left behind.
        SegmentTaken: a segment of this name exists and its daemon lives, or it is not ours.
        SegmentUnusable: the system refuses it for another reason.
    """
    blob: bytes = msgpack.packb(catalog.model_dump())
    header = _page_aligned(PAGE + len(blob))
    superblock = Superblock(os.getpid(), header, len(blob), _page_aligned(catalog.slot_bytes), zlib.crc32(blob))
    check_room(catalog.stage, superblock.segment_bytes, lock=lock)
    _remove_orphan(name)
    try:
        mapping = _make(name, superblock, blob, catalog.stage, lock=lock, mode=mode, group=group)
    except (OSError, posix_ipc.Error) as error:
        raise SegmentUnusable(
            f"segment {name} for stage {catalog.stage!r} cannot be made: {error}",
            remedy="check the daemon's permissions on /dev/shm and its group setting",
            stage=catalog.stage,
        ) from error
    return Segment(name, mapping, catalog, superblock)


def _make(
    name: str, superblock: Superblock, blob: bytes, stage: str, *, lock: bool, mode: int, group: int
) -> mmap.mmap:
    """Make and fill in a segment; nothing is left of it if anything fails."""
    shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=mode)
    with ExitStack() as undo, _closing(shared.fd):
        undo.callback(posix_ipc.unlink_shared_memory, name)
        os.fchmod(shared.fd, mode)
        os.fchown(shared.fd, -1, group)
        _allocate(shared.fd, stage, superblock.segment_bytes)
        mapping = mmap.mmap(shared.fd, superblock.segment_bytes)
        if lock:
            _lock(mapping, stage)
        mapping[PAGE : PAGE + len(blob)] = blob
        mapping[: _SUPERBLOCK.size] = superblock.pack()
        undo.pop_all()
    return mapping


def open_existing(name: str, *, writable: bool) -> Segment:
    """Map a segment that the daemon has made.

    Raises:
        SegmentUnreadable: it is not there, not ours, damaged, or of another format.
    """
    try:
        shared = posix_ipc.SharedMemory(name, read_only=not writable)
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError) as error:
        raise SegmentUnreadable(
            f"segment {name} cannot be opened: {error}",
            remedy="check that the daemon runs and that you are in its group",
        ) from error
    with _closing(shared.fd):
        superblock = Superblock.unpack(name, os.pread(shared.fd, PAGE, 0))
        if os.fstat(shared.fd).st_size < superblock.segment_bytes:
            raise SegmentUnreadable(f"segment {name} is truncated", remedy="restart the daemon")
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        mapping = mmap.mmap(shared.fd, superblock.segment_bytes, access=access)
    blob = bytes(mapping[PAGE : PAGE + superblock.catalog_bytes])
    if zlib.crc32(blob) != superblock.catalog_checksum:
        raise SegmentUnreadable(f"the catalog in segment {name} is damaged", remedy="restart the daemon")
    catalog = Catalog.model_validate(msgpack.unpackb(blob, use_list=False))
    return Segment(name, mapping, catalog, superblock)


def check_room(stage: str, size: int, *, lock: bool) -> None:
    """Refuse a segment that cannot be had, before anything is allocated. Raises NotEnoughMemory."""
    shm = os.statvfs(SHARED_MEMORY)
    limits = {
        "free in /dev/shm": (shm.f_bavail * shm.f_frsize, "enlarge /dev/shm (in a container: --shm-size)"),
        "of available memory": (psutil.virtual_memory().available, "use a machine with more memory"),
    }
    if lock and not _may_lock_anything():
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY:
            remedy = "raise the memory-locking limit (ulimit -l, LimitMEMLOCK=), or set STAGINGD_LOCK_MEMORY=false"
            limits["may be locked"] = (soft, remedy)
    for what, (room, remedy) in limits.items():
        if size > room:
            raise NotEnoughMemory(
                f"stage {stage!r} needs {_gib(size)} for two versions, but {_gib(room)} {what}",
                remedy=f"{remedy}, or stage fewer tensors",
                stage=stage,
            )


def _may_lock_anything() -> bool:
    """Whether the process has CAP_IPC_LOCK, to which the locking limit does not apply."""
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> 14 & 1)


def _remove_orphan(name: str) -> None:
    """Remove a segment that a killed daemon left behind; refuse one that is in use or not ours."""
    try:
        shared = posix_ipc.SharedMemory(name, read_only=True)
    except posix_ipc.ExistentialError:
        return
    except posix_ipc.PermissionsError as error:
        raise SegmentTaken(f"segment {name} belongs to another user", remedy="use another segment_prefix") from error
    with _closing(shared.fd):
        superblock = Superblock.unpack(name, os.pread(shared.fd, PAGE, 0))
    if superblock.pid != os.getpid() and psutil.pid_exists(superblock.pid):
        raise SegmentTaken(
            f"segment {name} is in use by the daemon with pid {superblock.pid}",
            remedy="stop that daemon, or use another segment_prefix",
        )
    posix_ipc.unlink_shared_memory(name)


def _allocate(fd: int, stage: str, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        raise NotEnoughMemory(
            f"stage {stage!r} needs {_gib(size)} for two versions: {os.strerror(error.errno)}",
            remedy="free memory, or enlarge /dev/shm",
            stage=stage,
        ) from error


def _lock(mapping: mmap.mmap, stage: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
    failed = libc.mlock(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapping)))
    number = ctypes.get_errno()
    size = len(mapping)
    del view  # or the mapping could never be closed
    if failed:
        mapping.close()
        raise NotEnoughMemory(
            f"stage {stage!r} cannot lock {_gib(size)}: {os.strerror(number)}",
            remedy="raise the memory-locking limit (ulimit -l, LimitMEMLOCK=), or set STAGINGD_LOCK_MEMORY=false",
            stage=stage,
        )


@contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _page_aligned(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"
