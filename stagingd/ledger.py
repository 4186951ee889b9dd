# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A record in shared memory that a crash cannot tear: it stands in two places, and the newest whole one counts.

Each place begins with a sequence number, the record's length and a CRC-32 of all three. Writing goes to the
place with the older record, so the newer one stands until the last byte of its successor is there.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from stagingd.errors import InternalError

_HEAD: Final = struct.Struct("<QI")
_CHECKSUM: Final = struct.Struct("<I")
OVERHEAD: Final = _HEAD.size + _CHECKSUM.size
"""Bytes of a place that do not hold the record."""


class Ledger:
    """Two places of equal size in ``memory``, which the caller keeps mapped."""

    def __init__(self, memory: memoryview) -> None:
        half = len(memory) // 2
        self._places = (memory[:half], memory[half : 2 * half])
        self._sequence = max((found[0] for found in map(_read, self._places) if found is not None), default=0)

    def write(self, record: bytes) -> None:
        """Make this the record. Raises InternalError when it is too long: the caller bounds what it keeps."""
        sequence = self._sequence + 1
        place = self._places[sequence % 2]
        end = OVERHEAD + len(record)
        if end > len(place):
            raise InternalError(
                f"a state record of {len(record)} bytes does not fit into {len(place) - OVERHEAD}",
                remedy="report this, with the output of stagingd status",
            )
        head = _HEAD.pack(sequence, len(record))
        place[:end] = head + _CHECKSUM.pack(zlib.crc32(record, zlib.crc32(head))) + record
        self._sequence = sequence

    def close(self) -> None:
        """Let go of the memory."""
        for place in self._places:
            place.release()

    def read(self) -> bytes | None:
        """The newest record that is whole, or None when neither is."""
        found = [entry for entry in map(_read, self._places) if entry is not None]
        return max(found)[1] if found else None


def _read(place: memoryview) -> tuple[int, bytes] | None:
    sequence, length = _HEAD.unpack_from(place)
    (checksum,) = _CHECKSUM.unpack_from(place, _HEAD.size)
    if sequence == 0 or OVERHEAD + length > len(place):
        return None
    record = bytes(place[OVERHEAD : OVERHEAD + length])
    head = bytes(place[: _HEAD.size])
    return (sequence, record) if zlib.crc32(record, zlib.crc32(head)) == checksum else None
