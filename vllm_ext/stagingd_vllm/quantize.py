# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""bf16 to FP8 with scales that are known beforehand: one pass, in torch; the reference for kernels.

Per tensor and per block the engine multiplies by the reciprocal of the scale, per channel it divides:
the two round differently, and bytes have to be equal.
"""

from __future__ import annotations

import torch

from stagingd.boxes import Box, cells
from stagingd.moments import cell_shape
from stagingd_vllm.scales import FP8_MAX, Granularity


def quantize(values: torch.Tensor, scale: torch.Tensor, granularity: Granularity, box: Box) -> torch.Tensor:
    """Quantize a slice of a tensor with the scales of the cells that it touches.

    Args:
        values: the slice, 2-dimensional, bfloat16 or float32.
        scale: float32 per touched cell, of the shape of ``stagingd.moments.cells_of``.
        granularity: what shares a scale.
        box: where the slice lies in its tensor: cells are counted from the tensor's origin, so a slice
            that starts inside a block uses that block's scale.

    Returns:
        float8_e4m3fn, of the shape of ``values``.
    """
    per_element = spread(scale, granularity, box)
    if granularity is Granularity.CHANNEL:
        scaled = values.float() / per_element
    else:
        scaled = values.float() * per_element.reciprocal()
    # As CUDA's fminf and fmaxf clamp: of zeros with a scale of zero, which are NaN, they make a number.
    most = torch.tensor(FP8_MAX, device=scaled.device)
    return torch.fmax(torch.fmin(scaled, most), -most).to(torch.float8_e4m3fn)


def spread(scale: torch.Tensor, granularity: Granularity, box: Box) -> torch.Tensor:
    """Scales of cells as a tensor that broadcasts over the box's elements."""
    if granularity is not Granularity.BLOCK:
        return scale
    for dim, size in enumerate(cell_shape(granularity.grid, box.ends)):
        touched = cells(box, cell_shape(granularity.grid, box.ends))
        index = torch.arange(box.offsets[dim], box.ends[dim], device=scale.device) // size - touched.offsets[dim]
        scale = scale.index_select(dim, index)
    return scale


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, granularity: Granularity, box: Box) -> torch.Tensor:
    """The float32 values that quantized ones stand for; arguments as in ``quantize``."""
    return quantized.float() * spread(scale, granularity, box)
