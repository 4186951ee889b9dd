# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Segments: what is made is found again, what is not ours is not read, nothing is left behind."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator

import posix_ipc
import pytest

from stagingd import segment
from stagingd.boxes import Box
from stagingd.catalog import Catalog, TensorDeclaration, build
from stagingd.errors import (
    NotEnoughMemory,
    SegmentForeign,
    SegmentTaken,
    SegmentUnreadable,
    SegmentUnusable,
    StagingError,
)
from stagingd.moments import ALL_GRIDS
from stagingd.segment import SHARED_MEMORY
from stagingd.superblock import PAGE, page_aligned

CATALOG_AT = PAGE + 2 * page_aligned(2**20 + 2**10)
"""Behind the superblock and the two places of the ledger of a stage with one trainer rank."""


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
    ("at", "data", "error", "why"),
    [
        (0, b"SOMEBODY", SegmentForeign, "not made by stagingd"),
        (8, b"\xff", SegmentUnreadable, "has format 255"),
        (20, b"\xff", SegmentUnreadable, "superblock of segment .* is damaged"),
        (CATALOG_AT + 5, b"\x00\x00", SegmentUnreadable, "catalog .* is damaged"),
    ],
)
def test_a_foreign_or_damaged_segment_is_not_read(
    name: str, catalog: Catalog, at: int, data: bytes, error: type[StagingError], why: str
) -> None:
    segment.create(name, catalog, lock=False)
    damage(name, at, data)
    with pytest.raises(error, match=why):
        segment.open_existing(name, writable=False)


def test_a_truncated_segment_is_not_read(name: str, catalog: Catalog) -> None:
    segment.create(name, catalog, lock=False)
    os.truncate(SHARED_MEMORY / name.lstrip("/"), 8192)
    with pytest.raises(SegmentUnreadable, match="truncated"):
        segment.open_existing(name, writable=False)


def test_a_segment_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SegmentUnreadable, match="cannot be opened"):
        segment.open_existing(name, writable=False)


def test_a_segment_is_adopted_once_its_daemon_has_ended_with_all_that_is_in_it(name: str, catalog: Catalog) -> None:
    made = segment.create(name, catalog, lock=False, terms=b"terms", state=b"state")
    made.slot(1)[:3] = b"abc"
    with pytest.raises(SegmentTaken, match="in use by another daemon"):
        segment.adopt(name, lock=False)
    made.close()
    adopted = segment.adopt(name, lock=True)
    assert (adopted.catalog, adopted.terms, adopted.ledger.read()) == (catalog, b"terms", b"state")
    assert bytes(adopted.slot(1)[:3]) == b"abc"
    with pytest.raises(SegmentTaken, match="in use by another daemon"):
        segment.adopt(name, lock=False)


def test_a_segment_that_exists_is_never_replaced(name: str, catalog: Catalog) -> None:
    made = segment.create(name, catalog, lock=False)
    made.close()
    with pytest.raises(SegmentTaken, match="that this daemon did not make"):
        segment.create(name, catalog, lock=False)
    assert segment.adopt(name, lock=False).catalog == catalog
    assert not (SHARED_MEMORY / f"{name.lstrip('/')}{segment.UNFINISHED}").exists()


def test_a_half_made_segment_is_removed_unless_somebody_is_making_it(name: str, catalog: Catalog) -> None:
    making = name + segment.UNFINISHED
    (SHARED_MEMORY / making.lstrip("/")).write_bytes(b"half")
    with (SHARED_MEMORY / making.lstrip("/")).open("rb") as maker:
        fcntl.flock(maker, fcntl.LOCK_EX)
        with pytest.raises(SegmentTaken, match="in use"):
            segment.create(name, catalog, lock=False)
    assert segment.create(name, catalog, lock=False).catalog == catalog
    assert not (SHARED_MEMORY / making.lstrip("/")).exists()


def test_terms_that_are_damaged_are_not_adopted(name: str, catalog: Catalog) -> None:
    made = segment.create(name, catalog, lock=False, terms=b"terms of the stage")
    made.close()
    with (SHARED_MEMORY / name.lstrip("/")).open("rb") as file:
        at = file.read().index(b"terms of the stage")
    damage(name, at, b"T")
    with pytest.raises(SegmentUnreadable, match=r"the terms .* are damaged"):
        segment.adopt(name, lock=False)


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
