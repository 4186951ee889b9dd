# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A stage's shared memory: superblock, ledger, catalog and two slots in one POSIX segment.

The daemon makes segments, keeps them locked as its own (``flock``) and removes them; clients map them. A
daemon that was killed leaves them, and its successor adopts them. A segment gets its name when all of it
stands: whoever finds the name finds a whole segment. Memory is allocated when the segment is made, so that
a machine that runs out says so then and there, and never by SIGBUS later.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgpack
import posix_ipc
from pydantic import ValidationError

from stagingd import superblock
from stagingd.catalog import Catalog
from stagingd.errors import NotEnoughMemory, SegmentForeign, SegmentTaken, SegmentUnreadable, SegmentUnusable
from stagingd.ledger import Ledger
from stagingd.memory import check_lockable, check_room, gib, lock_pages
from stagingd.moments import StoredMoments, stored_bytes
from stagingd.progress import Progress
from stagingd.superblock import PAGE, Superblock, page_aligned

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX segments, not a temporary folder
UNFINISHED: Final = "~making"
"""End of a segment's name while it is being made; no stage's name can hold it."""

_LEDGER_BASE: Final = 2**20
_LEDGER_PER_RANK: Final = 2**10
"""Bytes per place of the ledger: enough for as many readers as a stage admits, and for every trainer rank."""


class Segment:
    """A mapped segment: ``create`` or ``adopt`` it in the daemon, ``open_existing`` it in a client; close it when done.

    Attributes:
        name: the POSIX name, with its leading slash.
        catalog: what is where.
        terms: what the ranks agreed on besides, as the daemon wrote it.
        size: bytes in all.
        ledger: the state that the daemon keeps in it.
    """

    def __init__(
        self, name: str, mapping: mmap.mmap, catalog: Catalog, found: Superblock, owned_fd: int | None = None
    ) -> None:
        self.name = name
        self.catalog = catalog
        self.terms = bytes(mapping[found.terms_at : found.terms_at + found.terms_bytes])
        self.size = found.segment_bytes
        self.ledger = Ledger(memoryview(mapping)[PAGE : PAGE + found.ledger_bytes])
        self._superblock = found
        self._mapping = mapping
        self._owned_fd = owned_fd

    def slot(self, index: int) -> memoryview:
        """The bytes of slot 0 or 1."""
        start = self._superblock.header_bytes + index * self._superblock.slot_bytes
        return memoryview(self._mapping)[start : start + self.catalog.slot_bytes]

    def moments(self, index: int) -> StoredMoments:
        """The moments of slot 0 or 1."""
        at, cells = self.catalog.moments_offset, self.catalog.cells
        return StoredMoments(self.slot(index)[at : at + stored_bytes(cells)], cells)

    def progress(self, index: int) -> Progress:
        """How far slot 0 or 1 has been filled."""
        at = self.catalog.progress_offset
        return Progress(self.slot(index)[at : at + self.catalog.progress_bytes], self.catalog.ranks)

    def lock(self) -> Segment:
        """Keep it in physical memory (mlock), unless it has been closed. Returns itself. Raises NotEnoughMemory."""
        if not self._mapping.closed:
            lock_pages(self._mapping, self.catalog.stage)
        return self

    def close(self) -> None:
        """Unmap the segment and give up its ownership; it stays until the daemon removes it.

        Views that are still in use keep the mapping alive: it goes with the last of them.
        """
        if self._owned_fd is not None:
            os.close(self._owned_fd)
            self._owned_fd = None
        self.ledger.close()
        try:
            self._mapping.close()
        except BufferError:
            return

    def unlink(self) -> None:
        """Remove the segment's name; the memory goes when the last process has unmapped it."""
        _unlink(self.name)


def create(
    name: str,
    catalog: Catalog,
    *,
    lock: bool,
    terms: bytes = b"",
    state: bytes = b"",
    mode: int = 0o600,
    group: int = -1,
) -> Segment:
    """Make, allocate and, if ``lock``, page-lock a segment for a catalog.

    Args:
        name: its POSIX name.
        catalog: what it will hold.
        lock: keep it in physical memory (mlock).
        terms: what else is to stand beside the catalog.
        state: the ledger's first record.
        mode: permission bits.
        group: the Unix group's number, or -1 for the process's own.

    Raises:
        NotEnoughMemory: there is no room for two slots, or no permission to lock them. Nothing is left behind.
        SegmentTaken: a segment of this name exists.
        SegmentUnusable: the system refuses it for another reason.
    """
    blob: bytes = msgpack.packb(catalog.model_dump())
    place = page_aligned(_LEDGER_BASE + catalog.ranks * _LEDGER_PER_RANK)
    slot = page_aligned(catalog.slot_bytes)
    block = Superblock(2 * place, len(blob), len(terms), slot, zlib.crc32(blob), zlib.crc32(terms))
    check_room(catalog.stage, block.segment_bytes, SHARED_MEMORY, lock=lock)
    making = name + UNFINISHED
    discard(making)
    with ExitStack() as undo:
        try:
            shared = posix_ipc.SharedMemory(making, posix_ipc.O_CREX, mode=mode)
            undo.callback(os.close, shared.fd)
            undo.callback(_unlink, making)
            os.fchmod(shared.fd, mode)
            os.fchown(shared.fd, -1, group)
            _own(shared.fd, name)
            _allocate(shared.fd, catalog.stage, block.segment_bytes)
            mapping = mmap.mmap(shared.fd, block.segment_bytes)
            if lock:
                lock_pages(mapping, catalog.stage)
            mapping[block.catalog_at : block.terms_at] = blob
            mapping[block.terms_at : block.terms_at + len(terms)] = terms
            mapping[: len(block.pack())] = block.pack()
            made = Segment(name, mapping, catalog, block, shared.fd)
            made.ledger.write(state)
            _give_name(making, name)
        except (OSError, posix_ipc.Error) as error:
            raise SegmentUnusable(
                f"segment {name} for stage {catalog.stage!r} cannot be made: {error}",
                remedy="check the daemon's permissions on /dev/shm and its group setting",
                stage=catalog.stage,
            ) from error
        undo.pop_all()
    return made


def discard(name: str) -> None:
    """Remove a segment that a killed daemon has left half made, if there is one.

    Raises:
        SegmentTaken: a daemon is making it.
        SegmentForeign: it belongs to another user.
    """
    _check_ours(name)
    try:
        shared = posix_ipc.SharedMemory(name)
    except posix_ipc.ExistentialError:
        return
    with _closing(shared.fd):
        _own(shared.fd, name)
        _unlink(name)


def adopt(name: str, *, lock: bool, mode: int = 0o600, group: int = -1) -> Segment:
    """Take over a segment that a daemon of this user has left behind. Arguments are those of ``create``.

    With ``lock`` it is seen to that the segment may be locked; call its ``lock`` once clients are served, since
    that takes up to half a second a GiB.

    Raises:
        SegmentTaken: its daemon lives.
        SegmentForeign: it belongs to another user, or was not made by stagingd.
        SegmentUnreadable: it is damaged, truncated, or of another format.
        NotEnoughMemory: more is to be locked than the limit allows.
    """
    _check_ours(name)
    shared = _open(name, writable=True)
    with ExitStack() as undo:
        undo.callback(os.close, shared.fd)
        _own(shared.fd, name)
        block, mapping, catalog = _map(name, shared.fd, mmap.ACCESS_WRITE)
        terms = mapping[block.terms_at : block.terms_at + block.terms_bytes]
        if zlib.crc32(terms) != block.terms_checksum:
            raise _damaged(f"the terms in segment {name} are damaged")
        if lock:
            check_lockable(catalog.stage, block.segment_bytes)
        os.fchmod(shared.fd, mode)
        os.fchown(shared.fd, -1, group)
        undo.pop_all()
    return Segment(name, mapping, catalog, block, shared.fd)


def open_existing(name: str, *, writable: bool) -> Segment:
    """Map a segment that the daemon has made.

    Raises:
        SegmentForeign, SegmentUnreadable: it is not there, not ours, damaged, or of another format.
    """
    shared = _open(name, writable=writable)
    with _closing(shared.fd):
        block, mapping, catalog = _map(name, shared.fd, mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    return Segment(name, mapping, catalog, block)


def _check_ours(name: str) -> None:
    """Everybody may put something into /dev/shm, under any name. Raises SegmentForeign for all but our own files.

    To be called before it is opened. What is ours stays: its directory is sticky, so nobody else can replace it.
    """
    try:
        found = (SHARED_MEMORY / name.lstrip("/")).lstat()
    except FileNotFoundError:
        return
    if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
        raise SegmentForeign(
            f"segment {name} is not a file of this daemon's uid {os.geteuid()}: {stat.filemode(found.st_mode)}, "
            f"it belongs to uid {found.st_uid}",
            remedy="remove it, or use another segment_prefix",
        )


def _open(name: str, *, writable: bool) -> posix_ipc.SharedMemory:
    try:
        return posix_ipc.SharedMemory(name, read_only=not writable)
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError) as error:
        raise SegmentUnreadable(
            f"segment {name} cannot be opened: {error}",
            remedy="check that the daemon runs and that you are in its group",
        ) from error


def _map(name: str, fd: int, access: int) -> tuple[Superblock, mmap.mmap, Catalog]:
    block = superblock.unpack(name, os.pread(fd, PAGE, 0))
    size = os.fstat(fd).st_size
    if size != block.segment_bytes:
        raise _damaged(f"segment {name} is truncated: it has {size} of {block.segment_bytes} bytes")
    mapping = mmap.mmap(fd, size, access=access)
    blob = mapping[block.catalog_at : block.terms_at]
    if zlib.crc32(blob) != block.catalog_checksum:
        raise _damaged(f"the catalog in segment {name} is damaged")
    try:
        catalog = Catalog.model_validate(msgpack.unpackb(blob, use_list=False))
    except ValidationError as error:
        raise _damaged(f"the catalog in segment {name} is not one: {error.error_count()} fields are wrong") from error
    return block, mapping, catalog


def _damaged(what: str) -> SegmentUnreadable:
    return SegmentUnreadable(what, remedy="restart the daemon, which sets it aside, and declare the stage anew")


def _own(fd: int, name: str) -> None:
    """Mark the segment as this daemon's. The kernel lets go of it when the daemon ends, however it ends."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SegmentTaken(
            f"segment {name} is in use by another daemon",
            remedy="stop that daemon, or use another segment_prefix",
        ) from error


def _give_name(making: str, name: str) -> None:
    """Not by a rename, which would silently replace a segment of that name."""
    try:
        os.link(SHARED_MEMORY / making.lstrip("/"), SHARED_MEMORY / name.lstrip("/"))
    except FileExistsError as error:
        raise SegmentTaken(
            f"a segment {name} exists that this daemon did not make",
            remedy="look at the daemon's log; remove the segment, or use another segment_prefix",
        ) from error
    _unlink(making)


def _unlink(name: str) -> None:
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return


def _allocate(fd: int, stage: str, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        raise NotEnoughMemory(
            f"stage {stage!r} needs {gib(size)} for two versions: {os.strerror(error.errno)}",
            remedy="free memory, or enlarge /dev/shm",
            stage=stage,
        ) from error


@contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)
