# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moves and their tables: the arithmetic of the reference, spelled out a second time, and what the tiles cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from move_sets import MoveSet, aligned, halfway, move_sets
from stagingd_vllm.exactness import cell_amax
from stagingd_vllm.move_reference import run_moves
from stagingd_vllm.moves import ALIGNMENT, JOB_COLUMNS, TILE, Job, Move, MoveRefused, Scales, Treatment, table
from stagingd_vllm.quantize import quantize
from stagingd_vllm.scales import Granularity, scales

from stagingd.boxes import Box
from stagingd.dtypes import ITEM_BYTES

FP8_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
"""What the bytes 0 to 126 stand for, in ascending order."""


def after(made: MoveSet) -> torch.Tensor:
    """Live memory after the reference has carried the moves out."""
    live = aligned(made.live.numel())
    live.copy_(made.live)
    run_moves(made.at(live.data_ptr()), made.slot)
    return live


def fp8(scaled: np.ndarray) -> np.ndarray:
    """The byte of the nearest FP8 value, found by comparing; halfway, the even byte; of NaN, that of 448."""
    magnitude = np.minimum(np.where(np.isnan(scaled), 448.0, np.abs(scaled.astype(np.float64))), 448.0)
    upper = np.searchsorted(FP8_VALUES, magnitude).clip(1)
    below, above = magnitude - FP8_VALUES[upper - 1], FP8_VALUES[upper] - magnitude
    nearest = np.where((below < above) | ((below == above) & (upper % 2 == 1)), upper - 1, upper)
    return (nearest | np.where(np.signbit(scaled) & ~np.isnan(scaled), 0x80, 0)).astype(np.uint8)


def to_staged(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 rounded to the staged dtype, and widened again."""
    if dtype == "float32":
        return numbers
    if dtype == "float16":
        return numbers.astype(np.float16).astype(np.float32)
    low = (numbers.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bfloat16 by hand: the two neighbours
    high = (low.view(np.uint32) + 0x10000).view(np.float32)
    middle = np.where(np.isinf(high), np.copysign(2.0**127 * (2 - 2**-8), low), (low / 2.0 + high / 2.0))
    odd = (low.view(np.uint32) >> 16) % 2 == 1
    up = (np.abs(numbers) > np.abs(middle)) | ((numbers == middle) & odd)
    return np.where(np.isfinite(numbers) & up, high, np.where(np.isfinite(numbers), low, numbers))


def int8(quotient: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        rounded = np.rint(to_staged(quotient, dtype))
    return np.where(np.isnan(rounded), 0, np.clip(rounded, -127, 127)).astype(np.int8).view(np.uint8)


def elements(memory: np.ndarray, at: np.ndarray, dtype: str) -> np.ndarray:
    """The elements at some bytes of memory, as rows of their bytes."""
    return memory[at[..., None] + np.arange(ITEM_BYTES[dtype])]


def numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of bytes as fp32."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(raw).view(np.uint16)[..., 0].astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(raw).view({"float16": np.float16, "float32": np.float32}[dtype])[..., 0].astype("f4")


def scale_places(move: Move, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    grid = move.scales
    assert grid is not None
    down = (grid.first_row + row) // grid.row_cell * grid.row_stride if grid.row_cell else 0 * row
    across = (grid.first_column + column) // grid.column_cell if grid.column_cell else 0 * column
    return grid.address + 4 * (down + across)


def spelled_out(made: MoveSet) -> np.ndarray:
    """Live memory after the moves, element by element and byte by byte."""
    slot, live = made.slot.numpy(), made.live.numpy().copy()
    for move in made.moves:
        row, column = np.indices((move.rows, move.columns))
        size = ITEM_BYTES[move.staged]
        raw = elements(slot, move.source + size * (row * move.source_row + column * move.source_column), move.staged)
        places = move.target + ITEM_BYTES[move.live] * (row * move.target_row + column * move.target_column)
        if move.treatment is Treatment.PEAK:
            bits = np.abs(numbers(raw, move.staged)).view(np.uint32)
            np.maximum.at(live.view(np.uint32), scale_places(move, row, column) // 4, bits)
            continue
        with np.errstate(all="ignore"):
            result = _spelled_out(raw, move, live, row, column)
        live[places[..., None] + np.arange(ITEM_BYTES[move.live])] = result
    return live


def _spelled_out(raw: np.ndarray, move: Move, live: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    if move.treatment is Treatment.COPY:
        return raw
    given = numbers(raw, move.staged)
    if move.treatment is Treatment.CONVERT:
        if move.live == "bfloat16":
            return (to_staged(given, "bfloat16").view(np.uint32) >> 16).astype(np.uint16)[..., None].view(np.uint8)
        return given.astype({"float16": np.float16, "float32": np.float32}[move.live])[..., None].view(np.uint8)
    scale = numbers(elements(live, scale_places(move, row, column), "float32"), "float32")
    if move.treatment is Treatment.MULTIPLY:
        return fp8(given * (np.float32(1) / scale))[..., None]
    if move.treatment is Treatment.DIVIDE:
        return fp8(given / scale)[..., None]
    return int8(given / scale, move.staged)[..., None]


@settings(deadline=None, max_examples=100)
@given(move_sets())
def test_the_reference_does_what_is_spelled_out_here_and_nothing_else(made: MoveSet) -> None:
    assert np.array_equal(after(made).numpy(), spelled_out(made))


def test_multiplying_by_a_reciprocal_is_not_dividing() -> None:
    multiplied, divided = halfway(Treatment.MULTIPLY), halfway(Treatment.DIVIDE)
    assert np.array_equal(after(multiplied).numpy(), spelled_out(multiplied))
    assert np.array_equal(after(divided).numpy(), spelled_out(divided))
    assert not torch.equal(after(multiplied), after(divided))


@settings(deadline=None, max_examples=40)
@given(move_sets(most=8))
def test_tiles_cover_every_element_once_and_follow_the_slot(made: MoveSet) -> None:
    left = sorted(move.rows * move.columns for move in made.moves)
    for part in table(made.at(ALIGNMENT)):
        assert (np.diff(part.jobs[:, Job.SOURCE]) >= 0).all()
        assert (np.diff(part.tiles) >= 0).all()
        corners = part.corners()
        for number, job in enumerate(part.jobs):
            covered = np.zeros((job[Job.ROWS], job[Job.COLUMNS]), dtype=int)
            for _, row, column in corners[corners[:, 0] == number]:
                inside = covered[row : row + part.kind.tile_rows, column : column + part.kind.tile_columns]
                assert inside.size
                inside += 1
            assert (covered == 1).all()
            left.remove(covered.size)
    assert not left


def matrix(treatment: Treatment, live: str = "bfloat16", **changes: object) -> Move:
    grid = Scales(64) if treatment not in (Treatment.COPY, Treatment.CONVERT) else None
    move = Move(0, 48, 1, 32, 48, 4096, 48, 1, "bfloat16", live, treatment, grid)
    return replace(move, **changes)


FP8 = "float8_e4m3fn"
REFUSED = {
    "would be copied into float16": matrix(Treatment.COPY, "float16"),
    "has no scales": matrix(Treatment.MULTIPLY, FP8, scales=None),
    "has scales, for which copy has no use": matrix(Treatment.COPY, scales=Scales(64)),
    "no stage can hold": matrix(Treatment.COPY, "float4", staged="float4"),
    "can only be copied": matrix(Treatment.MULTIPLY, FP8, staged="int8"),
    "cannot be converted to bfloat16": matrix(Treatment.CONVERT),
    "cannot be converted to float8_e4m3fn": matrix(Treatment.CONVERT, FP8),
    "cannot become int8 by multiply": matrix(Treatment.MULTIPLY, "int8"),
    "cannot become float8_e4m3fn by round": matrix(Treatment.ROUND, FP8),
    "a size that is not positive": matrix(Treatment.COPY, rows=0),
    "too large": matrix(Treatment.COPY, columns=2**31),
    "a stride that is not positive": matrix(Treatment.COPY, target_row=0),
    "source at byte 1,": matrix(Treatment.COPY, source=1),
    "source at byte -2,": matrix(Treatment.COPY, source=-2),
    "target at address 4097,": matrix(Treatment.COPY, target=4097),
    "target at address 0,": matrix(Treatment.COPY, target=0),
    "scales at address 66,": matrix(Treatment.DIVIDE, FP8, scales=Scales(66)),
    "a number that is negative": matrix(Treatment.DIVIDE, FP8, scales=Scales(64, row_cell=-1)),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_move_that_contradicts_itself_is_refused(fault: str) -> None:
    with pytest.raises(MoveRefused, match=fault) as refused:
        table([matrix(Treatment.COPY), REFUSED[fault]])
    assert refused.value.context["move"] == 1


def test_strides_that_nothing_walks_do_not_count() -> None:
    one_row = matrix(Treatment.COPY, rows=1, source_row=0, target_row=7)
    one_column = matrix(Treatment.COPY, columns=1, source_row=1, target_row=1, source_column=0, target_column=9)
    assert len(table([one_row, one_column])[0].jobs) == 2


def test_contiguous_matrices_with_one_scale_become_long_rows() -> None:
    (part,) = table([matrix(Treatment.MULTIPLY, FP8, rows=3072, source_row=48)])
    assert (part.kind.tile_columns, len(part.tiles)) == (TILE, 3072 * 48 // TILE)
    (part,) = table([matrix(Treatment.MULTIPLY, FP8, rows=3072, scales=Scales(64, row_cell=1))])
    assert (part.kind.tile_columns, len(part.tiles)) == (64, 3072 * 64 // TILE)


def test_copies_of_one_element_size_are_one_kind() -> None:
    moves = [matrix(Treatment.COPY), matrix(Treatment.COPY, "float16", staged="float16")]
    assert [part.kind.staged for part in table(moves)] == ["int16"]


def test_a_mixture_of_experts_takes_a_small_table() -> None:
    expert = [
        matrix(Treatment.DIVIDE, FP8, rows=768, columns=2048, source_row=2048, target_row=2048, source=4096 * number)
        for number in range(18_867)
    ]
    moves = [replace(move, scales=Scales(64, row_cell=1)) for move in expert]
    (part,) = table(moves)
    assert len(part.tiles) == 18_867 * 768 * 2048 // TILE
    assert part.nbytes == 4 * len(part.tiles) + 8 * JOB_COLUMNS * len(moves) < 17 * 2**20


def carried(
    values: torch.Tensor, live: str, treatment: Treatment, scale: torch.Tensor, cells: Sequence[int]
) -> torch.Tensor:
    """What a matrix becomes with a grid of scales that begins where it does."""
    slot = values.contiguous().view(torch.uint8).view(-1)
    target = torch.empty(values.shape, dtype=getattr(torch, live))
    grid = Scales(scale.data_ptr(), *cells, row_stride=scale.shape[-1] if scale.dim() > 1 else 1)
    staged = str(values.dtype).removeprefix("torch.")
    rows, columns = values.shape
    place = target.data_ptr()
    run_moves([Move(0, columns, 1, rows, columns, place, columns, 1, staged, live, treatment, grid)], slot)
    return target


@pytest.mark.parametrize(
    ("granularity", "treatment", "cells"),
    [
        (Granularity.TENSOR, Treatment.MULTIPLY, (0, 0)),
        (Granularity.CHANNEL, Treatment.DIVIDE, (1, 0)),
        (Granularity.BLOCK, Treatment.MULTIPLY, (128, 128)),
    ],
)
def test_the_reference_quantizes_as_quantize_does(
    granularity: Granularity, treatment: Treatment, cells: tuple[int, int]
) -> None:
    values = (torch.randn(300, 280, generator=torch.Generator().manual_seed(5)) * 0.02).bfloat16()
    cell = tuple(size or length for size, length in zip(cells, values.shape, strict=True))
    scale = scales(cell_amax(values, cell), granularity)
    wanted = quantize(values, scale, granularity, Box((0, 0), (300, 280)))
    found = carried(values, FP8, treatment, scale, cells)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_int8_is_what_vllm_makes_in_the_dtype_of_the_model() -> None:
    values = torch.randn(64, 1000, generator=torch.Generator().manual_seed(6)).bfloat16()
    values[7] = 0.0
    scale = values.abs().amax(dim=1) / 127
    wanted = values.div(scale.unsqueeze(1)).round().clamp(-127, 127)
    found = carried(values, "int8", Treatment.ROUND, scale.float().unsqueeze(1), (1, 0))
    assert torch.equal(found, wanted.nan_to_num(0.0).to(torch.int8))
    once = (values.float() / scale.float().unsqueeze(1)).nan_to_num(0.0).round().to(torch.int8)
    assert not torch.equal(found, once)  # rounding the quotient to bfloat16 first does count


def test_zeros_with_a_scale_of_zero_become_what_vllm_makes_of_them() -> None:
    found = carried(torch.tensor([[0.0, -0.0]]).bfloat16(), FP8, Treatment.MULTIPLY, torch.zeros(1), (0, 0))
    assert found.view(torch.uint8).tolist() == [[0x7E, 0x7E]]
    assert (found.float() * 0.0).tolist() == [[0.0, 0.0]]


def test_a_converted_nan_stays_one() -> None:
    slot = torch.tensor([torch.nan, 1.0]).view(torch.uint8)
    target = torch.zeros(2, dtype=torch.bfloat16)
    run_moves([Move(0, 2, 1, 1, 2, target.data_ptr(), 2, 1, "float32", "bfloat16", Treatment.CONVERT)], slot)
    assert target.isnan().tolist() == [True, False]


def test_peaks_of_two_halves_are_those_of_the_whole() -> None:
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(7)).bfloat16()
    slot, peaks = values.view(torch.uint8).view(-1), torch.zeros(2, 3)
    whole = Move(0, 300, 1, 200, 300, 0, 0, 0, "bfloat16", "bfloat16", Treatment.PEAK)
    for first, rows in ((150, 50), (0, 150)):
        grid = Scales(peaks.data_ptr(), 128, 128, first_row=first, row_stride=3)
        run_moves([replace(whole, source=first * 600, rows=rows, scales=grid)], slot)
    assert torch.equal(peaks, cell_amax(values, (128, 128)))


def test_a_move_past_the_end_of_the_slot_is_refused() -> None:
    target = torch.zeros(32 * 48, dtype=torch.bfloat16)
    with pytest.raises(MoveRefused, match="ends at byte 3072, past the slot's 3071"):
        run_moves([matrix(Treatment.COPY, target=target.data_ptr())], torch.zeros(3071, dtype=torch.uint8))
