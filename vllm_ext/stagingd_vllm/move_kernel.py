# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel that carries moves out, in Triton. ``gpu_moves`` starts it, and ``moves`` says what it is told."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _widened(staged, BY_HAND: tl.constexpr):
    """To fp32, exactly."""
    if BY_HAND and staged.dtype == tl.bfloat16:
        return (staged.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return staged.to(tl.float32)


@triton.jit
def _rounded(values, TARGET: tl.constexpr, BY_HAND: tl.constexpr):
    """From fp32 to the nearest, ties to even."""
    if BY_HAND and tl.bfloat16 == TARGET:
        bits = values.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(values == values, even, bits | 0x400000)  # a NaN stays one
        return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(TARGET)


@triton.jit
def _fp8(values, BY_HAND: tl.constexpr):
    """The bytes of float8_e4m3fn: clamped to its finite values, to the nearest, ties to even; of a NaN, +448."""
    kept = tl.maximum(tl.minimum(values, 448.0), -448.0)  # the number, where the other is NaN
    if BY_HAND:
        sign = (kept.to(tl.uint32, bitcast=True) >> 24) & 0x80
        magnitude = tl.abs(kept)
        bits = magnitude.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 a step is 2**-9, as in fp32 from 2**14 to 2**15.
        small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        made = (sign | tl.where(magnitude < 0.015625, small, normal)).to(tl.uint8)
    else:
        made = kept.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return made


@triton.jit
def _int8(values, scale, STAGED: tl.constexpr, BY_HAND: tl.constexpr):
    quotient = _widened(_rounded(tl.div_rn(values, scale), STAGED, BY_HAND), BY_HAND)
    number = tl.where(quotient == quotient, quotient, 0.0)
    clamped = tl.maximum(tl.minimum(number, 127.0), -127.0)
    return ((clamped + 12582912.0) - 12582912.0).to(tl.int8)  # from 2**23 on an fp32's step is 1


@triton.jit
def _scale_number(job, row, column, PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr):
    """Of each element, as far as it depends on its row and its column."""
    number = tl.zeros([1, 1], tl.int64)
    if PER_ROW:
        cell = (tl.load(job + 12) + row).to(tl.int32) // tl.load(job + 10).to(tl.int32)
        number = number + (cell.to(tl.int64) * tl.load(job + 14))[:, None]
    if PER_COLUMN:
        cell = (tl.load(job + 13) + column).to(tl.int32) // tl.load(job + 11).to(tl.int32)
        number = number + cell.to(tl.int64)[None, :]
    return number


@triton.jit
def _scales(
    job, row, rows, first_column, columns,
    GROUPS: tl.constexpr, PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One for each group of neighbours, or, where there is but one for all rows or columns, that one."""
    grid = tl.load(job + 9).to(tl.pointer_type(tl.float32))
    if PER_ROW or PER_COLUMN:
        column = first_column + tl.arange(0, GROUPS) * GROUP
        there = tl.full([1, 1], True, tl.int1)
        if PER_ROW:
            there = there & (row < rows)[:, None]
        if PER_COLUMN:
            there = there & (column < columns)[None, :]
        made = tl.load(grid + _scale_number(job, row, column, PER_ROW, PER_COLUMN), mask=there, other=1.0)
    else:
        made = tl.load(grid)
    return made


@triton.jit
def _spread(scale, PER_COLUMN: tl.constexpr, GROUP: tl.constexpr):
    """From groups to elements."""
    if PER_COLUMN and GROUP > 1:
        ROWS: tl.constexpr = scale.shape[0]
        GROUPS: tl.constexpr = scale.shape[1]
        made = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, GROUP)), (ROWS, GROUPS * GROUP))
    else:
        made = scale
    return made


@triton.jit
def _quantized(
    values, scale, TREATMENT: tl.constexpr, STAGED: tl.constexpr, PER_COLUMN: tl.constexpr, GROUP: tl.constexpr,
    BY_HAND: tl.constexpr,
):  # fmt: skip
    # One return: what follows a return would be compiled too.
    if TREATMENT == "multiply":
        made = _fp8(values * _spread(tl.div_rn(1.0, scale), PER_COLUMN, GROUP), BY_HAND)
    else:
        values, scale = tl.broadcast(values, _spread(scale, PER_COLUMN, GROUP))
        if TREATMENT == "divide":
            made = _fp8(tl.div_rn(values, scale), BY_HAND)
        else:
            made = _int8(values, scale, STAGED, BY_HAND)
    return made


@triton.jit
def _take_peaks(
    staged, job, row, rows, first_column, columns,
    PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr, GROUP: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Magnitudes compare like the integers of the same bits, so that the order of the programs does not count."""
    ROWS: tl.constexpr = staged.shape[0]
    GROUPS: tl.constexpr = staged.shape[1] // GROUP
    bits = _widened(staged, BY_HAND).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peaks = tl.max(tl.reshape(bits, (ROWS, GROUPS, GROUP)), 2)
    column = first_column + tl.arange(0, GROUPS) * GROUP
    number = _scale_number(job, row, column, PER_ROW, PER_COLUMN) + tl.zeros([ROWS, GROUPS], tl.int64)
    grid = tl.load(job + 9).to(tl.pointer_type(tl.int32))
    tl.atomic_max(grid + number, peaks, mask=(row < rows)[:, None] & (column < columns)[None, :], sem="relaxed")


# Numbers that differ from launch to launch: to compile for each that is a multiple of 16 would be waited for.
@triton.jit(do_not_specialize=["slot", "count"])
def moves_kernel(
    slot,
    jobs,
    tiles,
    count,
    STAGED: tl.constexpr,
    LIVE: tl.constexpr,
    TREATMENT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    GROUP: tl.constexpr,
    JOB_COLUMNS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        job = jobs + tl.load(tiles + tile).to(tl.int64) * JOB_COLUMNS
        source = (slot + tl.load(job)).to(tl.pointer_type(STAGED))
        target = tl.load(job + 5).to(tl.pointer_type(LIVE))
        source_row = tl.load(job + 1)
        target_row = tl.load(job + 6)
        rows = tl.load(job + 3)
        columns = tl.load(job + 4)
        if ALIGNED:  # 16 bytes: whole vectors are loaded and stored
            source = tl.multiple_of(source, 16)
            target = tl.multiple_of(target, 16)
            source_row = tl.multiple_of(source_row, 16)
            target_row = tl.multiple_of(target_row, 16)
            columns = tl.multiple_of(columns, 16)
        number = tile - tl.load(job + 8)
        across = tl.cdiv(columns, TILE_COLUMNS)
        first_column = number % across * TILE_COLUMNS
        row = number // across * TILE_ROWS + tl.arange(0, TILE_ROWS)
        column = first_column + tl.arange(0, TILE_COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        source_column = column
        target_column = column
        if not DENSE:
            source_column = column * tl.load(job + 2)
            target_column = column * tl.load(job + 7)
        at = (row * source_row)[:, None] + source_column[None, :]
        # Through the nearest cache: a thread's vector of FP8 is made of two loads, and each of them takes half of
        # every sector. Past that cache (".cg") each sector crosses the link twice, at half the speed.
        staged = tl.load(source + at, mask=inside, other=0, eviction_policy="evict_first")
        if TREATMENT == "peak":
            _take_peaks(
                staged, job, row, rows, first_column, columns, PER_ROW, PER_COLUMN, GROUP, BY_HAND
            )  # fmt: skip
        else:
            target_at = (row * target_row)[:, None] + target_column[None, :]
            if TREATMENT == "copy":
                made = staged
            elif TREATMENT == "convert":
                made = _rounded(_widened(staged, BY_HAND), LIVE, BY_HAND)
            else:
                values = _widened(staged, BY_HAND)
                scale = _scales(
                    job, row, rows, first_column, columns, TILE_COLUMNS // GROUP, PER_ROW, PER_COLUMN, GROUP
                )
                made = _quantized(values, scale, TREATMENT, STAGED, PER_COLUMN, GROUP, BY_HAND)
            tl.store(target + target_at, made, mask=inside)
