# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A client of the daemon, written from docs/protocol.md and docs/segment.md alone. It imports nothing of stagingd.

Its tensors are lists of numbers in bfloat16: it is here to show that the two pages suffice, not to be quick.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import zmq

PAGES = Path(__file__).parents[1] / "docs"
ANSWER_MS = 10_000
SUPERBLOCK = struct.Struct("<8sIQQQQIII")
BLOCK = 128
ITEM_BYTES = {"bfloat16": 2, "int8": 1}

Index = tuple[int, ...]
Box = tuple[Sequence[int], Sequence[int]]
Values = dict[Index, float]


def told(page: str, what: str) -> int:
    """The number of the protocol or format that a page describes."""
    found = re.search(rf"This page describes {what} \*\*(\d+)\*\*", (PAGES / page).read_text())
    assert found is not None
    return int(found[1])


class Refused(Exception):
    """The daemon's refusal."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["what"])
        self.code = answer["code"]


class Client:
    """A connection that has said hello."""

    def __init__(self, directory: Path, name: str, token: bytes | None = None) -> None:
        self.token = token or os.urandom(16)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.connect(f"ipc://{directory}/control.sock")
        self._ids = (struct.pack("<Q", number) for number in itertools.count(1))
        number = told("protocol.md", "protocol")
        self.welcome = self.ask("hello", protocol=number, connection=self.token, name=name)

    def send(self, kind: str, **fields: Any) -> bytes:
        request_id = next(self._ids)
        self.socket.send_multipart([request_id, msgpack.packb({"kind": kind, **fields})])
        return request_id

    def answer(self, request_id: bytes, wait_s: float = 0.0) -> dict[str, Any]:
        while True:
            if not self.socket.poll(wait_s * 1000 + ANSWER_MS):
                raise TimeoutError
            got_id, body = self.socket.recv_multipart()
            if got_id == request_id:
                break
        got: dict[str, Any] = msgpack.unpackb(body)
        if got["kind"] == "refusal":
            raise Refused(got)
        return got

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self.answer(self.send(kind, **fields), fields.get("timeout_s", 0.0))

    def drop_connection(self) -> None:
        """As if it broke."""
        self.socket.close(linger=0)

    def close(self) -> None:
        self.ask("bye")
        self.socket.close(linger=0)


class Segment:
    """A stage's shared memory."""

    def __init__(self, name: str, *, writable: bool) -> None:
        path = f"/dev/shm/{name.removeprefix('/')}"
        with open(path, "r+b" if writable else "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        block = SUPERBLOCK.unpack_from(self.memory)
        mark, number, ledger, catalog, terms, self.slot_bytes, catalog_sum, terms_sum, own_sum = block
        assert (mark, number) == (b"STAGINGD", told("segment.md", "format"))
        assert zlib.crc32(self.memory[: SUPERBLOCK.size - 4]) == own_sum
        page = mmap.PAGESIZE
        catalog_at = page + ledger
        blob = self.memory[catalog_at : catalog_at + catalog]
        assert zlib.crc32(blob) == catalog_sum
        end = catalog_at + catalog + terms
        assert zlib.crc32(self.memory[catalog_at + catalog : end]) == terms_sum
        self.first_slot = -(-end // page) * page
        assert len(self.memory) == self.first_slot + 2 * self.slot_bytes
        self.catalog: dict[str, Any] = msgpack.unpackb(blob)

    def _slot(self, slot: int) -> int:
        return self.first_slot + slot * self.slot_bytes

    def _element(self, slot: int, tensor: dict[str, Any], index: Index) -> int:
        at = 0
        for i, length in zip(index, tensor["shape"], strict=True):
            at = at * length + i
        return self._slot(slot) + int(tensor["offset"]) + ITEM_BYTES[tensor["dtype"]] * at

    def owned_by(self, rank: int) -> list[dict[str, Any]]:
        return [owned for owned in self.catalog["owned"] if owned["rank"] == rank]

    def tensor(self, name: str) -> dict[str, Any]:
        name = next((alias["name"] for alias in self.catalog["aliases"] if alias["alias"] == name), name)
        return next(tensor for tensor in self.catalog["tensors"] if tensor["name"] == name)

    # A trainer

    def write(self, slot: int, owned: dict[str, Any], values: Values) -> None:
        """Write an owned box of a tensor, of all of whose values it is given, and the box's moments."""
        tensor = self.catalog["tensors"][owned["tensor"]]
        for index in indices(owned["box"]):
            self.memory[(at := self._element(slot, tensor, index)) : at + 2] = bfloat16(values[index])
        self.write_moments(slot, owned, values)

    def write_moments(self, slot: int, owned: dict[str, Any], values: Values) -> None:
        tensor = self.catalog["tensors"][owned["tensor"]]
        inside = {index: values[index] for index in indices(owned["box"])}
        number = owned["first_cell"]
        for grid in self.catalog["grids"]:
            size = cell_size(grid, tensor["shape"])
            for cell in cells(owned["box"], size):
                there = [value for index, value in inside.items() if cell_of(index, size) == cell]
                self._write_cell(slot, number, there)
                number += 1

    def write_int8(self, slot: int, owned: dict[str, Any], values: Values) -> None:
        """Write an owned box of a matrix that is quantized per row, once all moments are there."""
        tensor = self.catalog["tensors"][owned["tensor"]]
        for row, column in indices(owned["box"]):
            amax = self.merged(slot, tensor["name"], "row", (row, 0))["amax"]
            scale = scale_of(self.catalog["format"], self.catalog["device"], amax)
            quotient = float32(values[row, column] / scale)
            rounded = round(max(-127.0, min(127.0, rounded_to_bfloat16(quotient))))
            struct.pack_into("b", self.memory, self._element(slot, tensor, (row, column)), rounded)

    def _moment(self, slot: int, field: int, cell: int) -> int:
        stride = -(-4 * int(self.catalog["cells"]) // 256) * 256
        return self._slot(slot) + int(self.catalog["moments_offset"]) + field * stride + 4 * cell

    def _write_cell(self, slot: int, cell: int, values: list[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else 0.0
        m2 = sum((value - mean) ** 2 for value in finite)
        amax = max(map(abs, finite), default=0.0)
        for field, value in enumerate((mean, m2, amax)):
            struct.pack_into("<f", self.memory, self._moment(slot, field, cell), value)
        struct.pack_into("<I", self.memory, self._moment(slot, 3, cell), len(values) - len(finite))

    def start(self, slot: int, rank: int, attempt: int) -> None:
        """A rank takes part in an attempt."""
        struct.pack_into("<Q", self.memory, self._line(slot, 1 + rank) + 8, 0)
        struct.pack_into("<Q", self.memory, self._line(slot, 1 + rank), attempt)

    def land(self, slot: int, rank: int, boxes: int) -> None:
        """So many of a rank's boxes have landed."""
        struct.pack_into("<Q", self.memory, self._line(slot, 1 + rank) + 8, boxes)

    def _line(self, slot: int, line: int) -> int:
        lines = 1 + int(self.catalog["ranks"])
        return self._slot(slot) + int(self.catalog["slot_bytes"]) - 64 * (lines - line)

    # An engine

    def has_landed(self, slot: int, name: str, attempt: int) -> bool:
        """Whether all of a tensor is there. Raises LookupError: the attempt was given up."""
        filling, _, is_sealed = struct.unpack_from("<QQQ", self.memory, self._line(slot, 0))
        if filling != attempt:
            raise LookupError
        number = self.catalog["tensors"].index(self.tensor(name))
        for rank in range(self.catalog["ranks"]):
            of_rank = [owned["tensor"] for owned in self.owned_by(rank)]
            needed = max((n for n, tensor in enumerate(of_rank, 1) if tensor == number), default=0)
            taking_part, landed = struct.unpack_from("<QQ", self.memory, self._line(slot, 1 + rank))
            if is_sealed != attempt and (taking_part != attempt or landed < needed):
                return False
        return True

    def read(self, slot: int, name: str, box: Box) -> Values:
        tensor = self.tensor(name)
        found = {}
        for index in indices(box):
            at = self._element(slot, tensor, index)
            held = self.memory[at : at + ITEM_BYTES[tensor["dtype"]]]
            found[index] = float32_of(held) if tensor["dtype"] == "bfloat16" else float(struct.unpack("b", held)[0])
        return found

    def merged(self, slot: int, name: str, grid: str, wanted: Index) -> dict[str, float]:
        """The moments of a whole cell: count, mean, m2, amax and nonfinite."""
        tensor = self.tensor(name)
        size = cell_size(grid, tensor["shape"])
        total = {"count": 0.0, "mean": 0.0, "m2": 0.0, "amax": 0.0, "nonfinite": 0.0}
        for owned in self.catalog["owned"]:
            if self.catalog["tensors"][owned["tensor"]] is not tensor:
                continue
            number = owned["first_cell"]
            for other in self.catalog["grids"]:
                touched = list(cells(owned["box"], cell_size(other, tensor["shape"])))
                if other == grid and wanted in touched:
                    inside = sum(cell_of(index, size) == wanted for index in indices(owned["box"]))
                    total = merge(total, self._cell(slot, number + touched.index(wanted), inside))
                number += len(touched)
        return total

    def _cell(self, slot: int, cell: int, elements: int) -> dict[str, float]:
        mean, m2, amax = (
            struct.unpack_from("<f", self.memory, self._moment(slot, field, cell))[0] for field in range(3)
        )
        (nonfinite,) = struct.unpack_from("<I", self.memory, self._moment(slot, 3, cell))
        return {"count": elements - nonfinite, "mean": mean, "m2": m2, "amax": amax, "nonfinite": nonfinite}

    def close(self) -> None:
        self.memory.close()


def indices(box: Box) -> Iterator[Index]:
    """The elements of a box, in row-major order."""
    return itertools.product(*(range(o, o + n) for o, n in zip(*box, strict=True)))


def cell_size(grid: str, shape: Sequence[int]) -> Index:
    dims = len(shape)
    if grid == "tensor":
        return tuple(shape)
    if grid == "row":
        return (1,) * (dims - 1) + tuple(shape[-1:])
    return (1,) * (dims - 2) + (BLOCK,) * min(2, dims)


def cells(box: Box, size: Index) -> Iterator[Index]:
    """The cells that a box touches, in row-major order."""
    touched = [range(o // s, -(-(o + n) // s)) for o, n, s in zip(*box, size, strict=True)]
    return itertools.product(*touched)


def cell_of(index: Index, size: Index) -> Index:
    return tuple(i // s for i, s in zip(index, size, strict=True))


def merge(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    count = a["count"] + b["count"]
    delta = b["mean"] - a["mean"]
    share = b["count"] / count if count else 0.0
    return {
        "count": count,
        "mean": a["mean"] + delta * share,
        "m2": a["m2"] + b["m2"] + delta * delta * a["count"] * share,
        "amax": max(a["amax"], b["amax"]),
        "nonfinite": a["nonfinite"] + b["nonfinite"],
    }


def bfloat16(value: float) -> bytes:
    """The upper half of a float32. For numbers that have no more bits than that."""
    packed = struct.pack("<f", value)
    assert packed[:2] == b"\0\0" or not math.isfinite(value)
    return packed[2:]


def float32_of(half: bytes) -> float:
    return float(struct.unpack("<f", b"\0\0" + half)[0])


def float32(value: float) -> float:
    """Rounded to float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def rounded_to_bfloat16(value: float) -> float:
    """Rounded to nearest, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


def scale_of(stage_format: str, device: str, amax: float) -> float:
    if stage_format == "fp8_per_tensor":
        return float32(amax / 448)
    if stage_format == "fp8_per_channel":
        return max(float32(amax / 448), float32(1 / (448 * 512)))
    if stage_format == "fp8_per_block":
        floored = max(amax, float32(1e-4))
        return float32(floored / 448) if device == "cpu" else float32(floored * float32(1 / 448))
    return rounded_to_bfloat16(float32(rounded_to_bfloat16(amax) / 127))
