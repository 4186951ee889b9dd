# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""bf16 to FP8 and INT8, in torch, with scales that are known beforehand: rounded as engines round.

The reference that kernels are held to, and what runs on CPUs. Bytes have to be those that an engine makes of the whole
tensor: per tensor and per block it multiplies by the reciprocal of the scale, per channel it divides, and for INT8 it
rounds the quotient twice.
"""

from __future__ import annotations

from typing import Final

import torch

from stagingd.boxes import Box, Shape
from stagingd.errors import WrongDtype, WrongShape
from stagingd.formats import QUANTIZED_FROM, StageFormat
from stagingd.moments import BLOCK, Grid, cells_of

FP8_MAX: Final = 448.0
INT8_MAX: Final = 127.0


def quantized(
    values: torch.Tensor, scales: torch.Tensor, stage_format: StageFormat, box: Box, shape: Shape
) -> torch.Tensor:
    """Quantize a box of a tensor with the scales of the cells that it touches.

    Args:
        values: the box's elements, bfloat16 or float16, of the box's shape; on any device. Dims before the last two
            count matrices.
        scales: float32 per touched cell, of the shape of ``stagingd.moments.cells_of`` the format's grid; on the same
            device.
        stage_format: what shares a scale, and how a value and its scale become a byte.
        box: where the elements lie in their tensor. Cells are counted from the tensor's origin, so a box that starts
            inside a block uses that block's scale.
        shape: the tensor's, of two or more dims.

    Returns:
        float8_e4m3fn or int8 as the format says, of the box's shape. A NaN (also of a zero and its scale of zero)
        becomes 448 or, as an integer, 0.

    Raises:
        WrongDtype: values are of another dtype.
        WrongShape: values are not of the box's shape, or scales not of its cells'.
    """
    _check(values, scales, stage_format, box, shape)
    if stage_format is StageFormat.INT8_PER_CHANNEL:
        # The engine's quotient is in the values' dtype, and is rounded to an integer from there.
        quotient = (values.float() / scales).to(values.dtype).float()
        return quotient.nan_to_num_(0.0).clamp_(-INT8_MAX, INT8_MAX).round_().to(torch.int8)
    if stage_format is StageFormat.FP8_PER_CHANNEL:
        return _as_float8(values.float() / scales)
    # A reciprocal per cell, not per element: it is the same number.
    return _as_float8(values.float() * _spread(scales.reciprocal(), stage_format.grid, box))


def _as_float8(scaled: torch.Tensor) -> torch.Tensor:
    # As CUDA's fminf and fmaxf clamp: of zeros with a scale of zero, which are NaN, they make a number.
    most = scaled.new_full((), FP8_MAX)
    return torch.fmax(torch.fmin(scaled, most), -most).to(torch.float8_e4m3fn)


def _spread(cells: torch.Tensor, grid: Grid, box: Box) -> torch.Tensor:
    """What cells have, as a tensor that broadcasts over the box's elements."""
    if grid is not Grid.BLOCK:
        return cells
    for dim in (-2, -1):
        block = torch.arange(box.offsets[dim], box.ends[dim], device=cells.device) // BLOCK
        cells = cells.index_select(dim, block - box.offsets[dim] // BLOCK)
    return cells


def _check(values: torch.Tensor, scales: torch.Tensor, stage_format: StageFormat, box: Box, shape: Shape) -> None:
    if str(values.dtype).removeprefix("torch.") not in QUANTIZED_FROM:
        raise WrongDtype(
            f"values of box {box} are {values.dtype}, of which no engine makes {stage_format}",
            remedy=f"quantize one of {', '.join(sorted(QUANTIZED_FROM))}",
            box=box,
        )
    cells = cells_of(stage_format.grid, shape, box).lengths
    if tuple(values.shape) != box.lengths or tuple(scales.shape) != cells:
        raise WrongShape(
            f"box {box} of a tensor of shape {shape} has values of shape {tuple(values.shape)} "
            f"and scales of shape {tuple(scales.shape)}, which should be {cells}",
            remedy="give the values of the whole box, and the scale of each cell that it touches",
            box=box,
        )
