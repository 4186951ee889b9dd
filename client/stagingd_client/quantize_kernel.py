# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel that quantizes strips by scales that are known, in Triton. ``stagingd_client.gpu_quantize`` starts it."""

from __future__ import annotations

import triton
import triton.language as tl

from stagingd_client.strip_kernel import _inside, _load, _rounded, _widened


@triton.jit
def _fp8(values, BY_HAND: tl.constexpr):
    """The bytes of float8_e4m3fn: clamped to its finite values, to the nearest, ties to even; of a NaN, +448."""
    kept = tl.maximum(tl.minimum(values, 448.0), -448.0)  # the number, where the other is NaN
    if BY_HAND:
        bits = tl.abs(kept).to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 a step is 2**-9, as in fp32 from 2**14 to 2**15.
        small = (tl.abs(kept) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        sign = (kept.to(tl.uint32, bitcast=True) >> 24) & 0x80
        made = (sign | tl.where(tl.abs(kept) < 0.015625, small, normal)).to(tl.uint8)
    else:
        made = kept.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return made


@triton.jit
def _int8(quotient, STAGED: tl.constexpr, BY_HAND: tl.constexpr):
    """Rounded as the engine rounds: to the values' dtype, and from there to an integer; of a NaN, 0."""
    number = _widened(_rounded(quotient, STAGED, BY_HAND), BY_HAND)
    clamped = tl.maximum(tl.minimum(tl.where(number == number, number, 0.0), 127.0), -127.0)
    whole = (clamped + 12582912.0) - 12582912.0  # from 2**23 on an fp32's step is 1
    return whole.to(tl.int8).to(tl.uint8, bitcast=True)


@triton.jit
def _quantized(values, scale, FORMAT: tl.constexpr, STAGED: tl.constexpr, BY_HAND: tl.constexpr):
    # One return: what follows a return would be compiled too.
    if FORMAT == "fp8_per_channel":
        values, scale = tl.broadcast(values, scale)
        made = _fp8(tl.div_rn(values, scale), BY_HAND)
    elif FORMAT == "int8_per_channel_weight_only":
        values, scale = tl.broadcast(values, scale)
        made = _int8(tl.div_rn(values, scale), STAGED, BY_HAND)
    else:
        made = _fp8(values * tl.div_rn(1.0, scale), BY_HAND)
    return made


# Numbers that differ from launch to launch: to compile for each that is a multiple of 16 would be waited for.
@triton.jit(do_not_specialize=["first_strip"])
def quantize_kernel(
    jobs,
    strips,
    first_strip,
    scratch,
    scales,
    SOURCE: tl.constexpr,
    STAGED: tl.constexpr,
    FORMAT: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    EDGE: tl.constexpr,
    JOB_COLUMNS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    strip = first_strip + tl.program_id(0)
    job = jobs + tl.load(strips + 2 * strip).to(tl.int64) * JOB_COLUMNS
    block_row = tl.load(strips + 2 * strip + 1).to(tl.int64)
    rows = tl.load(job + 1)
    columns = tl.load(job + 2)
    size_1 = tl.load(job + 4)
    size_2 = tl.load(job + 5)
    size_3 = tl.load(job + 6)
    stride_0 = tl.load(job + 7)
    stride_1 = tl.load(job + 8)
    stride_2 = tl.load(job + 9)
    stride_3 = tl.load(job + 10)
    target_at = tl.load(job + 12)
    columns_left = tl.load(job + 14)
    cell = tl.load(job + 15)
    source = tl.load(job).to(tl.pointer_type(SOURCE))
    if ALIGNED:  # 16 bytes are loaded and 8 stored at a time
        source = tl.multiple_of(source, 16)
        columns = tl.multiple_of(columns, 8)
        stride_0 = tl.multiple_of(stride_0, 8)
        stride_1 = tl.multiple_of(stride_1, 8)
        stride_2 = tl.multiple_of(stride_2, 8)
        stride_3 = tl.multiple_of(stride_3, 8)
        target_at = tl.multiple_of(target_at, 8)
        columns_left = tl.multiple_of(columns_left, 8)
    row = block_row * EDGE - tl.load(job + 13) + tl.arange(0, EDGE)
    row_inside = (row >= 0) & (row < rows)
    place = tl.load(job + 3) + row
    row_start = place % size_3 * stride_3
    place = place // size_3
    row_start += place % size_2 * stride_2
    place = place // size_2
    row_start += place % size_1 * stride_1 + place // size_1 * stride_0
    target_row = scratch + target_at + row * columns
    blocks = tl.cdiv(columns_left + columns, EDGE)
    scale = tl.load(scales + cell + tl.zeros([1, 1], tl.int64))
    if FORMAT == "fp8_per_channel" or FORMAT == "int8_per_channel_weight_only":
        scale = tl.load(scales + cell + row, mask=row_inside, other=1.0)[:, None]

    # In four parts of 32 columns, as values are cast: so a thread's registers suffice.
    QUARTER: tl.constexpr = EDGE // 4
    for quarter in range(blocks * 4):
        first = quarter * QUARTER - columns_left
        if FORMAT == "fp8_per_block":
            scale = tl.load(scales + cell + block_row * blocks + quarter // 4 + tl.zeros([1, 1], tl.int64))
        loaded = _load(source, row_start, row_inside, first, columns, tl.load(job + 11), DENSE, FULL, QUARTER)
        values = _widened(_rounded(loaded, STAGED, BY_HAND), BY_HAND)
        made = _quantized(values, scale, FORMAT, STAGED, BY_HAND)
        column = first + tl.arange(0, QUARTER)
        if FULL:
            tl.store(target_row[:, None] + column[None, :], made)
        else:
            inside = _inside(row_inside, first, columns, QUARTER)
            tl.store(target_row[:, None] + column[None, :], made, mask=inside)
