# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The ledger: whatever a crash leaves of a write, the record before it or the new one is read, never a mixture."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagingd.errors import InternalError
from stagingd.ledger import OVERHEAD, Ledger

SIZE = 2 * (OVERHEAD + 64)
records = st.binary(max_size=64)


def torn(before: bytes, after: bytes, landed: set[int]) -> bytearray:
    """Memory in which only some bytes of a write have landed."""
    return bytearray(after[i] if i in landed else before[i] for i in range(len(before)))


def test_an_empty_ledger_has_no_record() -> None:
    assert Ledger(memoryview(bytearray(SIZE))).read() is None


@given(st.lists(records, min_size=1, max_size=6))
def test_the_last_record_is_read_also_by_a_successor(written: list[bytes]) -> None:
    memory = bytearray(SIZE)
    for record in written:
        Ledger(memoryview(memory)).write(record)  # each by a successor of the one before
        assert Ledger(memoryview(memory)).read() == record


@given(records, records, records, st.integers(0, SIZE))
def test_a_write_that_ends_in_the_middle_leaves_the_old_record_or_the_new(
    first: bytes, old: bytes, new: bytes, landed: int
) -> None:
    memory = bytearray(SIZE)
    ledger = Ledger(memoryview(memory))
    ledger.write(first)
    ledger.write(old)
    before = bytes(memory)
    ledger.write(new)
    half = torn(before, bytes(memory), set(range(landed)))
    assert Ledger(memoryview(half)).read() in (old, new)


@given(records, records, st.sets(st.integers(0, SIZE - 1)))
def test_bytes_that_land_in_any_order_make_no_mixture(old: bytes, new: bytes, landed: set[int]) -> None:
    memory = bytearray(SIZE)
    ledger = Ledger(memoryview(memory))
    ledger.write(old)
    before = bytes(memory)
    ledger.write(new)
    assert Ledger(memoryview(torn(before, bytes(memory), landed))).read() in (old, new)


@given(records, st.integers(0, SIZE // 2 - 1), st.integers(1, 255))
def test_a_damaged_record_is_not_read(record: bytes, at: int, flip: int) -> None:
    memory = bytearray(SIZE)
    Ledger(memoryview(memory)).write(record)
    memory[SIZE // 2 + at] ^= flip
    found = Ledger(memoryview(memory)).read()
    assert found is None or (found == record and at >= OVERHEAD + len(record))


def test_after_damage_the_next_record_goes_where_the_older_stands() -> None:
    memory = bytearray(SIZE)
    ledger = Ledger(memoryview(memory))
    ledger.write(b"one")
    ledger.write(b"two")
    memory[0] ^= 255  # record two stands in the first place
    again = Ledger(memoryview(memory))
    assert again.read() == b"one"
    again.write(b"three")
    assert Ledger(memoryview(memory)).read() == b"three"


def test_a_record_that_does_not_fit_is_refused_and_the_old_one_stands() -> None:
    memory = bytearray(SIZE)
    ledger = Ledger(memoryview(memory))
    ledger.write(b"old")
    with pytest.raises(InternalError, match="65 bytes does not fit into 64"):
        ledger.write(bytes(65))
    assert ledger.read() == b"old"
