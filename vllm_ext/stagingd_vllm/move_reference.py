# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moves carried out by torch on a CPU: for engines that run on one, and the reference that the kernel is held to."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from stagingd.dtypes import ITEM_BYTES
from stagingd_vllm.moves import Move, MoveRefused, Scales, Treatment
from stagingd_vllm.scales import FP8_MAX

INT8_MAX = 127.0


def run_moves(moves: Iterable[Move], slot: torch.Tensor) -> None:
    """Carry out moves that ``moves.table`` accepts, one after another.

    Args:
        moves: their targets and scales are in this process's own memory.
        slot: the slot's bytes: uint8, contiguous, on the CPU.

    Raises:
        MoveRefused: a move reads past the slot's end.
    """
    for move in moves:
        if move.source_end > slot.numel():
            raise MoveRefused(
                f"A move of {move.rows} x {move.columns} {move.staged} at byte {move.source} ends at byte "
                f"{move.source_end}, past the slot's {slot.numel()}",
                remedy="make the moves anew from the catalog of the stage that is mapped",
            )
        size, stride = (move.rows, move.columns), (move.source_row, move.source_column)
        values = _at(slot.data_ptr() + move.source, move.staged, size, stride)
        if move.treatment is Treatment.PEAK:
            _take_peaks(values, _scales(move), move)
        else:
            target = _at(move.target, move.live, size, (move.target_row, move.target_column))
            target.copy_(_treated(values, move))


def _at(address: int, dtype: str, size: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """Memory of this process as a matrix."""
    count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    memory = (ctypes.c_char * (count * ITEM_BYTES[dtype])).from_address(address)
    return torch.frombuffer(memory, dtype=getattr(torch, dtype)).as_strided(size, stride)


def _treated(values: torch.Tensor, move: Move) -> torch.Tensor:
    """What is to be stored, as a tensor whose conversion to the target's dtype is exact or rounds rightly."""
    if move.treatment in (Treatment.COPY, Treatment.CONVERT):
        return values
    scale = _scales(move)
    if move.treatment is Treatment.MULTIPLY:
        return _clamped(values.float() * _spread(scale.reciprocal(), move))
    quotient = values.float() / _spread(scale, move)
    if move.treatment is Treatment.DIVIDE:
        return _clamped(quotient)
    return quotient.to(values.dtype).float().nan_to_num(0.0).clamp(-INT8_MAX, INT8_MAX).round()


def _clamped(values: torch.Tensor) -> torch.Tensor:
    """To FP8's finite values, as CUDA's fminf and fmaxf do it: a NaN is left aside, not passed on."""
    most = torch.tensor(FP8_MAX)
    return torch.fmax(torch.fmin(values, most), -most)


def _needed(move: Move) -> Scales:
    assert move.scales is not None  # moves.table has seen to it
    return move.scales


def _cells(first: int, size: int, cell: int) -> tuple[int, int]:
    """The first cell that is touched, and how many are."""
    return (first // cell, (first + size - 1) // cell - first // cell + 1) if cell else (0, 1)


def _scales(move: Move) -> torch.Tensor:
    """The scales that a move touches, as a matrix that shares their memory."""
    grid = _needed(move)
    top, down = _cells(grid.first_row, move.rows, grid.row_cell)
    left, across = _cells(grid.first_column, move.columns, grid.column_cell)
    address = grid.address + (top * grid.row_stride + left) * ITEM_BYTES["float32"]
    return _at(address, "float32", (down, across), (grid.row_stride, 1))


def _spread(scale: torch.Tensor, move: Move) -> torch.Tensor:
    """Scales of cells as a tensor that broadcasts over the elements."""
    grid = _needed(move)
    if grid.column_cell:
        column = torch.arange(grid.first_column, grid.first_column + move.columns) // grid.column_cell
        scale = scale.index_select(1, column - column[0])
    if grid.row_cell:
        row = torch.arange(grid.first_row, grid.first_row + move.rows) // grid.row_cell
        scale = scale.index_select(0, row - row[0])
    return scale


def _take_peaks(values: torch.Tensor, peaks: torch.Tensor, move: Move) -> None:
    """By the bits of the magnitudes, as integers: a NaN is then the greatest."""
    grid = _needed(move)
    (top, height), (left, width) = (
        (first % cell, cell) if cell else (0, size)
        for first, cell, size in (
            (grid.first_row, grid.row_cell, move.rows),
            (grid.first_column, grid.column_cell, move.columns),
        )
    )
    down, across = peaks.shape
    margins = (left, across * width - left - move.columns, top, down * height - top - move.rows)
    bits = F.pad(values.float().abs(), margins).view(torch.int32)
    found = bits.view(down, height, across, width).amax((1, 3))
    held = peaks.view(torch.int32)
    held.copy_(torch.maximum(held, found))
