# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Segments: what is made is found again, what is not ours is not read, nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import posix_ipc
import pytest

from stagingd import segment
from stagingd.boxes import Box
from stagingd.catalog import Catalog, TensorDeclaration, build
from stagingd.errors import NotEnoughMemory, SegmentTaken, SegmentUnreadable, SegmentUnusable
from stagingd.moments import ALL_GRIDS
from stagingd.segment import SHARED_MEMORY


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a segment that is gone after the test."""
    name = f"/stagingd-test-{uuid.uuid4().hex[:12]}"
    yield name
    (SHARED_MEMORY / name.lstrip("/")).unlink(missing_ok=True)


@pytest.fixture
def catalog() -> Catalog:
    tensor = TensorDeclaration(name="w", dtype="bfloat16", shape=(300, 200), boxes=(Box((0, 0), (300, 200)),))
    return build("policy", [[tensor]], ALL_GRIDS)


def test_a_client_finds_the_catalog_and_both_slots(name: str, catalog: Catalog) -> None:
    made = segment.create(name, catalog, lock=False)
    for slot in (0, 1):
        made.slot(slot)[:] = bytes([slot + 1]) * catalog.slot_bytes
    found = segment.open_existing(name, writable=False)
    assert found.catalog == catalog
    assert [bytes(found.slot(slot)[-1:]) for slot in (0, 1)] == [b"\x01", b"\x02"]
    assert found.size == made.size == os.stat(SHARED_MEMORY / name.lstrip("/")).st_size


def test_a_reader_cannot_write(name: str, catalog: Catalog) -> None:
    segment.create(name, catalog, lock=False)
    with pytest.raises(TypeError, match="read-only"):
        segment.open_existing(name, writable=False).slot(0)[0] = 1


def test_all_memory_is_allocated_when_the_segment_is_made(name: str, catalog: Catalog) -> None:
    made = segment.create(name, catalog, lock=False)
    assert os.stat(SHARED_MEMORY / name.lstrip("/")).st_blocks * 512 >= made.size


def test_memory_is_locked_on_request(name: str, catalog: Catalog) -> None:
    made = segment.create(name, catalog, lock=True)
    with open("/proc/self/smaps") as maps:
        lines = iter(maps)
        next(line for line in lines if name.lstrip("/") in line)
        locked = next(line for line in lines if line.startswith("Locked:"))
    assert int(locked.split()[1]) * 1024 >= made.size


def damage(name: str, at: int, data: bytes) -> None:
    with open(SHARED_MEMORY / name.lstrip("/"), "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [(0, b"SOMEBODY", "not made by stagingd"), (8, b"\xff", "has format 255"), (4096 + 5, b"\x00\x00", "is damaged")],
)
def test_a_foreign_or_damaged_segment_is_not_read(name: str, catalog: Catalog, at: int, data: bytes, why: str) -> None:
    segment.create(name, catalog, lock=False)
    damage(name, at, data)
    with pytest.raises(SegmentUnreadable, match=why):
        segment.open_existing(name, writable=False)


def test_a_truncated_segment_is_not_read(name: str, catalog: Catalog) -> None:
    segment.create(name, catalog, lock=False)
    os.truncate(SHARED_MEMORY / name.lstrip("/"), 8192)
    with pytest.raises(SegmentUnreadable, match="truncated"):
        segment.open_existing(name, writable=False)


def test_a_segment_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SegmentUnreadable, match="cannot be opened"):
        segment.open_existing(name, writable=False)


def test_what_a_killed_daemon_left_is_replaced(name: str, catalog: Catalog) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    segment.create(name, catalog, lock=False)
    damage(name, 12, dead.pid.to_bytes(4, "little"))
    assert segment.create(name, catalog, lock=False).catalog == catalog


def test_a_segment_of_a_live_daemon_is_not_touched(name: str, catalog: Catalog) -> None:
    segment.create(name, catalog, lock=False)
    damage(name, 12, (1).to_bytes(4, "little"))
    with pytest.raises(SegmentTaken, match="pid 1"):
        segment.create(name, catalog, lock=False)


def test_what_the_system_refuses_is_a_typed_error_and_nothing_is_left(
    name: str, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(segment.os, "fchown", forbidden)
    with pytest.raises(SegmentUnusable, match="Operation not permitted"):
        segment.create(name, catalog, lock=False)
    assert not (SHARED_MEMORY / name.lstrip("/")).exists()


def test_nothing_is_left_when_memory_runs_out(name: str, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment.os, "posix_fallocate", full)
    with pytest.raises(NotEnoughMemory, match="No space left on device"):
        segment.create(name, catalog, lock=False)
    with pytest.raises(posix_ipc.ExistentialError):
        posix_ipc.SharedMemory(name)
