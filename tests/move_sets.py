# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Random sets of moves: what a slot holds, what live memory holds before, and moves of every shape between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from stagingd_vllm.moves import Move, Scales, Treatment

from stagingd.dtypes import ITEM_BYTES

FLOATS = ("bfloat16", "float16", "float32")
QUANTIZED = {
    Treatment.MULTIPLY: "float8_e4m3fn",
    Treatment.DIVIDE: "float8_e4m3fn",
    Treatment.ROUND: "int8",
}

CANARY = 0xA5
GAP = 64
"""Bytes of live memory that nobody may touch, around everything."""

UNPOISONED = (Treatment.CONVERT, Treatment.PEAK)
"""Treatments that pass a NaN on: which NaN comes out differs between processors."""


@dataclass(frozen=True)
class MoveSet:
    """Moves whose addresses are counted from the first byte of live memory."""

    moves: list[Move]
    slot: torch.Tensor
    live: torch.Tensor

    def at(self, base: int) -> list[Move]:
        """The moves, with live memory at an address."""
        return [
            replace(
                move,
                target=move.target + base,
                scales=move.scales and replace(move.scales, address=move.scales.address + base),
            )
            for move in self.moves
        ]


@dataclass(frozen=True)
class Matrix:
    """Strides of a matrix, and how many elements of memory it spans."""

    row: int
    column: int
    span: int


def _laid_out(draw: st.DrawFn, rows: int, columns: int) -> Matrix:
    layout = draw(st.sampled_from(("packed", "packed", "in rows", "in rows", "transposed", "strided")))
    room = draw(st.sampled_from((0, 1, 16))) if layout != "packed" else 0
    if layout == "transposed":
        row, column = 1, rows + room
    elif layout == "strided":
        column = draw(st.integers(2, 3))
        row = columns * column + room
    else:
        row, column = columns + room, 1
    return Matrix(row, column, 1 + (rows - 1) * row + (columns - 1) * column)


def _dtypes(draw: st.DrawFn, treatment: Treatment) -> tuple[str, str]:
    staged = draw(st.sampled_from(sorted(ITEM_BYTES) if treatment is Treatment.COPY else FLOATS))
    if treatment is Treatment.CONVERT:
        return staged, draw(st.sampled_from([name for name in FLOATS if name != staged]))
    if treatment in (Treatment.MULTIPLY, Treatment.DIVIDE):
        return staged, "float8_e4m3fn"
    return staged, "int8" if treatment is Treatment.ROUND else staged


def values(kind: np.random.Generator, dtype: str, count: int, *, poisoned: bool) -> np.ndarray:
    """Bytes of elements: small whole numbers times powers of two, among which are all halfway cases of FP8 and int8,
    magnitudes of every size, both zeros, the largest and the smallest; NaN and infinity where it is poisoned."""
    if dtype not in FLOATS:
        return kind.integers(0, 2 if dtype == "bool" else 256, count * ITEM_BYTES[dtype], dtype=np.uint8)
    torch_dtype = getattr(torch, dtype)
    halves = kind.integers(0, 256, count) * 2.0 ** kind.integers(-12, 5, count)
    sizes = kind.standard_normal(count) * 2.0 ** kind.integers(-140, 127, count)
    ends = kind.choice([0.0, 1e-45, torch.finfo(torch_dtype).tiny, torch.finfo(torch_dtype).max, 448.0, 464.0], count)
    picked = np.choose(kind.integers(0, 4, count), [halves, halves, sizes, ends]) * kind.choice([-1.0, 1.0], count)
    if poisoned:
        picked = np.where(kind.random(count) < 0.02, kind.choice([np.nan, np.inf, -np.inf], count), picked)
    most = torch.finfo(torch_dtype).max
    made = torch.from_numpy(np.where(np.isfinite(picked), np.clip(picked, -most, most), picked)).to(torch_dtype)
    return made.view(torch.uint8).numpy()


def _scales(draw: st.DrawFn, rows: int, columns: int) -> tuple[Scales, int]:
    """A grid at address 0, and how many scales it has."""
    row_cell, column_cell = draw(st.sampled_from(((0, 0), (0, 0), (1, 0), (128, 128), (128, 128), (16, 48), (0, 32))))
    first_row, first_column = draw(st.integers(0, 130)), draw(st.sampled_from((0, 0, 16, 64, 128, 3, 77)))
    across = (first_column + columns - 1) // column_cell + 1 if column_cell else 1
    down = (first_row + rows - 1) // row_cell + 1 if row_cell else 1
    stride = across + draw(st.integers(0, 2))
    return Scales(0, row_cell, column_cell, first_row, first_column, stride), down * stride


@st.composite
def move_sets(draw: st.DrawFn, most: int = 4) -> MoveSet:
    """Some moves in random order, with gaps between everything that they read and write."""
    kind = np.random.default_rng(draw(st.integers(0, 2**32)))
    slot, live = bytearray(), bytearray()
    moves = []
    for _ in range(draw(st.integers(1, most))):
        treatment = draw(st.sampled_from(list(Treatment)))
        staged, live_dtype = _dtypes(draw, treatment)
        rows, columns = draw(st.integers(1, 70)), draw(st.one_of(st.integers(1, 300), st.sampled_from((64, 128, 256))))
        source, target = _laid_out(draw, rows, columns), _laid_out(draw, rows, columns)
        begins = _put(draw, slot, values(kind, staged, source.span, poisoned=treatment not in UNPOISONED), staged)
        scales = None
        if treatment not in (Treatment.COPY, Treatment.CONVERT):
            scales, count = _scales(draw, rows, columns)
            rates = np.abs(kind.standard_normal(count)) * 2.0 ** kind.integers(-20, 10, count)
            picked = np.choose(kind.integers(0, 8, count), [rates] * 4 + [np.exp2(np.round(np.log2(rates)))] * 3 + [0])
            grid = np.zeros(count) if treatment is Treatment.PEAK else picked
            scales = replace(scales, address=_put(draw, live, grid.astype(np.float32).view(np.uint8), "float32"))
        room = np.full(target.span * ITEM_BYTES[live_dtype], CANARY, dtype=np.uint8)
        place = _put(draw, live, room, live_dtype)
        moves.append(
            Move(
                begins, source.row, source.column, rows, columns,
                place, target.row, target.column, staged, live_dtype, treatment, scales,
            )
        )  # fmt: skip
    slot += bytes(GAP)
    live += bytes([CANARY] * (GAP - len(live) % GAP))
    return MoveSet(
        draw(st.permutations(moves)),
        torch.frombuffer(bytearray(slot), dtype=torch.uint8),
        torch.frombuffer(bytearray(live), dtype=torch.uint8),
    )


def _put(draw: st.DrawFn, memory: bytearray, content: np.ndarray, dtype: str) -> int:
    """Append bytes behind a gap, on the alignment of their element or a better one; returns where they begin."""
    shift = draw(st.sampled_from((0, 0, 1, 3))) * ITEM_BYTES[dtype]
    begins = -(-(len(memory) + GAP) // 64) * 64 + shift
    memory += bytes([CANARY] * (begins - len(memory))) + content.tobytes()
    return begins


def aligned(size: int, device: str = "cpu", *, pinned: bool = False) -> torch.Tensor:
    """Bytes that begin at a multiple of 64."""
    room = torch.empty(size + 64, dtype=torch.uint8, device=device, pin_memory=pinned)
    return room[-room.data_ptr() % 64 :][:size]


def wide(rows: int, columns: int, treatment: Treatment, cells: tuple[int, int], first_column: int = 0) -> MoveSet:
    """An aligned matrix, as most are."""
    kind = np.random.default_rng(rows + columns)
    slot = torch.from_numpy(values(kind, "bfloat16", rows * columns, poisoned=False))
    grid = np.zeros(1024, dtype=np.float32) if treatment is Treatment.PEAK else kind.random(1024, dtype=np.float32)
    live = torch.cat(
        [torch.from_numpy(grid.view(np.uint8)), torch.full((4 * rows * columns,), 0xA5, dtype=torch.uint8)]
    )
    scales = None if treatment is Treatment.COPY else Scales(0, *cells, first_column=first_column, row_stride=16)
    name = QUANTIZED.get(treatment, "bfloat16")
    return MoveSet(
        [Move(0, columns, 1, rows, columns, 4096, columns, 1, "bfloat16", name, treatment, scales)], slot, live
    )


WIDE = {
    "a long row": wide(20, 2048, Treatment.COPY, (0, 0)),
    "one scale": wide(20, 2048, Treatment.MULTIPLY, (0, 0)),
    "a scale per row": wide(64, 768, Treatment.DIVIDE, (1, 0)),
    "blocks": wide(130, 2048, Treatment.MULTIPLY, (128, 128)),
    "blocks that begin elsewhere": wide(130, 400, Treatment.MULTIPLY, (128, 128), 72),
    "int8": wide(64, 768, Treatment.ROUND, (1, 0)),
    "one peak": wide(20, 2048, Treatment.PEAK, (0, 0)),
    "peaks of rows": wide(64, 768, Treatment.PEAK, (1, 0)),
    "peaks of blocks": wide(130, 2048, Treatment.PEAK, (128, 128)),
    "peaks of blocks that begin elsewhere": wide(130, 400, Treatment.PEAK, (128, 128), 72),
}


def halfway(treatment: Treatment) -> MoveSet:
    """Rows of fp32, each of which its scale, an odd number, divides exactly halfway between two FP8 values.

    Times the scale's reciprocal, which is rounded, many of them no longer are.
    """
    scales = np.arange(1, 129, dtype=np.float32) * 2 - 1
    ties = np.concatenate([(np.arange(8, 16) + 0.5) * 2.0**power for power in range(-6, 2)]).astype(np.float32)
    staged = scales[:, None] * ties[None, :]
    live = np.concatenate([scales.view(np.uint8), np.full(staged.size + GAP, CANARY, dtype=np.uint8)])
    live = np.concatenate([live, np.full(-live.size % GAP, CANARY, dtype=np.uint8)])
    rows, columns = staged.shape
    place = Scales(0, row_cell=1)
    move = Move(
        0, columns, 1, rows, columns, scales.nbytes, columns, 1, "float32", QUANTIZED[treatment], treatment, place
    )
    return MoveSet([move], torch.from_numpy(staged.view(np.uint8).reshape(-1)), torch.from_numpy(live))
