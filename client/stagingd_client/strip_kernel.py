# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel that casts strips and takes their moments, in Triton. ``stagingd_client.gpu_moments`` starts it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _merge(count, mean, m2, more, more_mean, more_m2):
    """The moments of two disjoint sets (Chan, Golub and LeVeque 1979)."""
    total = count + more
    share = more / tl.maximum(total, 1.0)
    delta = more_mean - mean
    return total, mean + delta * share, m2 + more_m2 + delta * delta * count * share


@triton.jit
def _union(count, mean, m2, bits, more, more_mean, more_m2, more_bits):
    total, center, around = _merge(count, mean, m2, more, more_mean, more_m2)
    return total, center, around, tl.maximum(bits, more_bits)


@triton.jit
def _store_cells(cells, field_stride, at, mask, mean, m2, amax, nonfinite):
    tl.store(cells + at, mean, mask=mask)
    tl.store(cells + field_stride + at, m2, mask=mask)
    tl.store(cells + 2 * field_stride + at, amax, mask=mask)
    tl.store((cells + 3 * field_stride).to(tl.pointer_type(tl.int32)) + at, nonfinite.to(tl.int32), mask=mask)


@triton.jit
def _rounded(values, TARGET: tl.constexpr, BY_HAND: tl.constexpr):
    """To the nearest, ties to even."""
    if BY_HAND and tl.bfloat16 == TARGET:
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(values == values, even, bits | 0x400000)  # a NaN stays one
        return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(TARGET)


@triton.jit
def _widened(staged, BY_HAND: tl.constexpr):
    """To fp32, exactly."""
    if BY_HAND and staged.dtype == tl.bfloat16:
        return (staged.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return staged.to(tl.float32)


@triton.jit
def _inside(row_inside, first, columns, WIDTH: tl.constexpr):
    column = first + tl.arange(0, WIDTH)
    return row_inside[:, None] & ((column >= 0) & (column < columns))[None, :]


@triton.jit
def _load(
    source, row_start, row_inside, first, columns, column_stride, DENSE: tl.constexpr, FULL: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    column = (first + tl.arange(0, WIDTH)).to(tl.int64)
    if DENSE:
        at = row_start[:, None] + column[None, :]
    else:
        at = row_start[:, None] + column[None, :] * column_stride
    if FULL:
        return tl.load(source + at, mask=(column < columns)[None, :], other=0.0)
    return tl.load(source + at, mask=_inside(row_inside, first, columns, WIDTH), other=0.0)


@triton.jit
def _stage(
    values, target, row, row_inside, first, columns, FULL: tl.constexpr, PACKED: tl.constexpr, BY_HAND: tl.constexpr
):
    """Cast, and store if it is to be packed; returns the values as staged: what the cast lost must not count."""
    WIDTH: tl.constexpr = values.shape[1]
    column = first + tl.arange(0, WIDTH)
    staged = _rounded(values, target.dtype.element_ty, BY_HAND)
    at = (row * columns)[:, None] + column[None, :]
    if PACKED:
        if FULL:
            tl.store(target + at, staged)
        else:
            tl.store(target + at, staged, mask=_inside(row_inside, first, columns, WIDTH))
    return _widened(staged, BY_HAND)


@triton.jit
def _magnitude(seen):
    """The bits of a value without its sign are in the order of magnitudes: infinity and NaN come last."""
    return seen.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _squared(seen, mean, row_inside, first, columns, FULL: tl.constexpr):
    away = seen - mean[:, None]
    if not FULL:
        away = tl.where(_inside(row_inside, first, columns, seen.shape[1]), away, 0.0)
    return away * away


@triton.jit
def _squared_finite(seen, mean, row_inside, first, columns):
    counts = _inside(row_inside, first, columns, seen.shape[1]) & (_magnitude(seen) < 0x7F800000)
    away = tl.where(counts, seen - mean[:, None], 0.0)
    return away * away


@triton.jit
def _finite(seen):
    """The finite values and 0 for others; their magnitudes; where the others are."""
    finite = _magnitude(seen) < 0x7F800000
    kept = tl.where(finite, seen, 0.0)
    return kept, _magnitude(kept), (~finite).to(tl.float32)


# Numbers that differ from launch to launch: to compile for each that is a multiple of 16 would be waited for.
@triton.jit(do_not_specialize=["first_strip", "field_stride", "partials_stride"])
def strips_kernel(
    jobs,
    strips,
    first_strip,
    scratch,
    cells,
    field_stride,
    partials,
    partials_stride,
    SOURCE: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    PACKED: tl.constexpr,
    WITH_ROWS: tl.constexpr,
    WITH_BLOCKS: tl.constexpr,
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
    column_stride = tl.load(job + 11)
    target_at = tl.load(job + 12)
    rows_left = tl.load(job + 13)
    columns_left = tl.load(job + 14)
    row_cell = tl.load(job + 15)
    block_cell = tl.load(job + 16)
    source = tl.load(job).to(tl.pointer_type(SOURCE))
    if ALIGNED:  # 16 bytes: whole vectors are loaded and stored
        source = tl.multiple_of(source, 16)
        columns = tl.multiple_of(columns, 8)
        stride_0 = tl.multiple_of(stride_0, 8)
        stride_1 = tl.multiple_of(stride_1, 8)
        stride_2 = tl.multiple_of(stride_2, 8)
        stride_3 = tl.multiple_of(stride_3, 8)
        target_at = tl.multiple_of(target_at, 8)
        columns_left = tl.multiple_of(columns_left, 8)
    target = scratch + target_at
    row = block_row * EDGE - rows_left + tl.arange(0, EDGE)
    row_inside = (row >= 0) & (row < rows)
    place = tl.load(job + 3) + row
    row_start = place % size_3 * stride_3
    place = place // size_3
    row_start += place % size_2 * stride_2
    place = place // size_2
    row_start += place % size_1 * stride_1 + place // size_1 * stride_0
    blocks = tl.cdiv(columns_left + columns, EDGE)
    block_cell += block_row * blocks

    # A block is taken in four parts of 32 columns: a row is then reduced within few threads, mostly in registers.
    QUARTER: tl.constexpr = EDGE // 4
    count = tl.zeros([EDGE], tl.float32)
    mean = tl.zeros([EDGE], tl.float32)
    m2 = tl.zeros([EDGE], tl.float32)
    bits = tl.zeros([EDGE], tl.int32)
    bad = tl.zeros([EDGE], tl.float32)
    first = -columns_left
    next_0 = _load(source, row_start, row_inside, first, columns, column_stride, DENSE, FULL, QUARTER)
    next_1 = _load(source, row_start, row_inside, first + QUARTER, columns, column_stride, DENSE, FULL, QUARTER)
    next_2 = _load(source, row_start, row_inside, first + 2 * QUARTER, columns, column_stride, DENSE, FULL, QUARTER)
    next_3 = _load(source, row_start, row_inside, first + 3 * QUARTER, columns, column_stride, DENSE, FULL, QUARTER)
    for block in range(blocks):
        first = block * EDGE - columns_left
        x_0 = _stage(next_0, target, row, row_inside, first, columns, FULL, PACKED, BY_HAND)
        x_1 = _stage(next_1, target, row, row_inside, first + QUARTER, columns, FULL, PACKED, BY_HAND)
        x_2 = _stage(next_2, target, row, row_inside, first + 2 * QUARTER, columns, FULL, PACKED, BY_HAND)
        x_3 = _stage(next_3, target, row, row_inside, first + 3 * QUARTER, columns, FULL, PACKED, BY_HAND)
        # The block after this one is on its way while this one is reduced.
        after = first + EDGE
        next_0 = _load(source, row_start, row_inside, after, columns, column_stride, DENSE, FULL, QUARTER)
        next_1 = _load(source, row_start, row_inside, after + QUARTER, columns, column_stride, DENSE, FULL, QUARTER)
        next_2 = _load(source, row_start, row_inside, after + 2 * QUARTER, columns, column_stride, DENSE, FULL, QUARTER)
        next_3 = _load(source, row_start, row_inside, after + 3 * QUARTER, columns, column_stride, DENSE, FULL, QUARTER)
        width = (tl.minimum(first + EDGE, columns) - tl.maximum(first, 0)).to(tl.float32)
        here = tl.where(row_inside, width, 0.0)
        here_bad = tl.zeros([EDGE], tl.float32)
        here_mean = tl.sum(x_0 + x_1 + x_2 + x_3, 1) / tl.maximum(here, 1.0)
        here_m2 = tl.sum(
            _squared(x_0, here_mean, row_inside, first, columns, FULL)
            + _squared(x_1, here_mean, row_inside, first + QUARTER, columns, FULL)
            + _squared(x_2, here_mean, row_inside, first + 2 * QUARTER, columns, FULL)
            + _squared(x_3, here_mean, row_inside, first + 3 * QUARTER, columns, FULL),
            1,
        )
        here_bits = tl.max(
            tl.maximum(tl.maximum(_magnitude(x_0), _magnitude(x_1)), tl.maximum(_magnitude(x_2), _magnitude(x_3))),
            1,
        )
        _, block_mean, block_m2, block_bits = tl.reduce((here, here_mean, here_m2, here_bits), 0, _union)
        if block_bits >= 0x7F800000:  # seldom: there are NaN or infinite values, and all has to be taken without them
            y_0, bits_0, bad_0 = _finite(x_0)
            y_1, bits_1, bad_1 = _finite(x_1)
            y_2, bits_2, bad_2 = _finite(x_2)
            y_3, bits_3, bad_3 = _finite(x_3)
            here_bad = tl.sum(bad_0 + bad_1 + bad_2 + bad_3, 1)
            here -= here_bad
            here_mean = tl.sum(y_0 + y_1 + y_2 + y_3, 1) / tl.maximum(here, 1.0)
            here_m2 = tl.sum(
                _squared_finite(x_0, here_mean, row_inside, first, columns)
                + _squared_finite(x_1, here_mean, row_inside, first + QUARTER, columns)
                + _squared_finite(x_2, here_mean, row_inside, first + 2 * QUARTER, columns)
                + _squared_finite(x_3, here_mean, row_inside, first + 3 * QUARTER, columns),
                1,
            )
            here_bits = tl.max(tl.maximum(tl.maximum(bits_0, bits_1), tl.maximum(bits_2, bits_3)), 1)
            _, block_mean, block_m2, block_bits = tl.reduce((here, here_mean, here_m2, here_bits), 0, _union)
        if WITH_BLOCKS:
            block_amax, block_bad = block_bits.to(tl.float32, bitcast=True), tl.sum(here_bad, 0)
            _store_cells(cells, field_stride, block_cell + block, True, block_mean, block_m2, block_amax, block_bad)
        count, mean, m2 = _merge(count, mean, m2, here, here_mean, here_m2)
        bits = tl.maximum(bits, here_bits)
        bad += here_bad
    if WITH_ROWS:
        row_amax = bits.to(tl.float32, bitcast=True)
        _store_cells(cells, field_stride, row_cell + row, row_inside, mean, m2, row_amax, bad)
    _, strip_mean, strip_m2, strip_bits = tl.reduce((count, mean, m2, bits), 0, _union)
    strip_amax = strip_bits.to(tl.float32, bitcast=True)
    _store_cells(partials, partials_stride, strip, True, strip_mean, strip_m2, strip_amax, tl.sum(bad, 0))
