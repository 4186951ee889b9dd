# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The first bytes of a segment: whose it is, of what format, and where everything else in it lies.

    0                superblock: magic, format, sizes, checksums of the blobs and of itself
    PAGE             ledger: the changing state, in two places
    + ledger_bytes   catalog, as msgpack; behind it the terms, as msgpack
    header_bytes     slot 0: tensors, then their moments, then how far it has been filled
    + slot_bytes     slot 1

It is written once, before the segment gets its name, and never changes.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import astuple, dataclass
from typing import Final

from stagingd.errors import SegmentForeign, SegmentUnreadable

MAGIC: Final = b"STAGINGD"
FORMAT: Final = 5
PAGE: Final = mmap.PAGESIZE
_HEAD: Final = struct.Struct("<8sI")
_SIZES: Final = struct.Struct("<QQQQII")
_CHECKSUM: Final = struct.Struct("<I")
_BYTES: Final = _HEAD.size + _SIZES.size + _CHECKSUM.size


@dataclass(frozen=True)
class Superblock:
    """Sizes in bytes, checksums as CRC-32."""

    ledger_bytes: int
    catalog_bytes: int
    terms_bytes: int
    slot_bytes: int
    catalog_checksum: int
    terms_checksum: int

    @property
    def catalog_at(self) -> int:
        """Where the catalog begins."""
        return PAGE + self.ledger_bytes

    @property
    def terms_at(self) -> int:
        """Where the terms begin."""
        return self.catalog_at + self.catalog_bytes

    @property
    def header_bytes(self) -> int:
        """Everything before slot 0."""
        return page_aligned(self.terms_at + self.terms_bytes)

    @property
    def segment_bytes(self) -> int:
        """Size of the whole segment."""
        return self.header_bytes + 2 * self.slot_bytes

    def pack(self) -> bytes:
        """As it stands in the segment."""
        body = _HEAD.pack(MAGIC, FORMAT) + _SIZES.pack(*astuple(self))
        return body + _CHECKSUM.pack(zlib.crc32(body))


def unpack(name: str, data: bytes) -> Superblock:
    """Read the first bytes of a segment.

    Raises:
        SegmentForeign: it was not made by stagingd.
        SegmentUnreadable: it is damaged, or of another format.
    """
    if len(data) < _BYTES or data[: len(MAGIC)] != MAGIC:
        raise SegmentForeign(
            f"segment {name} was not made by stagingd", remedy="remove it, or use another segment_prefix"
        )
    _, fmt = _HEAD.unpack_from(data)
    if fmt != FORMAT:
        raise SegmentUnreadable(
            f"segment {name} has format {fmt}, this stagingd reads format {FORMAT}",
            remedy="use the same version of stagingd everywhere",
        )
    body = data[: _HEAD.size + _SIZES.size]
    (checksum,) = _CHECKSUM.unpack_from(data, len(body))
    if zlib.crc32(body) != checksum:
        raise SegmentUnreadable(f"the superblock of segment {name} is damaged", remedy="restart the daemon")
    return Superblock(*_SIZES.unpack_from(data, _HEAD.size))


def page_aligned(size: int) -> int:
    """The next multiple of the page size."""
    return -(-size // PAGE) * PAGE
