# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What trainers quantize is, byte by byte, what an engine's reader makes of the whole tensor, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from move_sets import values as raw_values
from random_cuts import cuts
from stagingd_client.moments import shard_moments
from stagingd_client.quantize import quantized
from stagingd_vllm import schemes
from stagingd_vllm.move_reference import run_moves
from stagingd_vllm.moves import Move, Scales, table
from stagingd_vllm.quantize import quantize
from stagingd_vllm.schemes import Scheme

from stagingd import format_scales
from stagingd.boxes import Box, Shape, whole
from stagingd.errors import WrongDtype, WrongShape
from stagingd.formats import StageFormat
from stagingd.moments import BLOCK, Grid, cells_of

SCHEMES = {
    StageFormat.FP8_PER_TENSOR: schemes.FP8_PER_TENSOR,
    StageFormat.FP8_PER_CHANNEL: schemes.FP8_PER_CHANNEL,
    StageFormat.FP8_PER_BLOCK: schemes.FP8_PER_BLOCK,
    StageFormat.INT8_PER_CHANNEL: schemes.INT8_PER_CHANNEL,
}
SHAPES: list[Shape] = [(1, 1), (7, 300), (130, 7), (259, 140), (3, 140, 20), (2, 2, 5, 129)]
CELLS = {Grid.TENSOR: (0, 0), Grid.ROW: (1, 0), Grid.BLOCK: (BLOCK, BLOCK)}
"""Rows and columns that share a scale, as moves count them."""

by_format = pytest.mark.parametrize("stage_format", StageFormat)


def values_of(shape: Shape, dtype: str, seed: int) -> torch.Tensor:
    """Halfway cases, magnitudes of every size, both zeros, and some that are not finite."""
    kind = np.random.default_rng(seed)
    raw = raw_values(kind, dtype, int(np.prod(shape)), poisoned=seed % 2 == 0)
    return torch.from_numpy(raw).view(getattr(torch, dtype)).view(shape)


def own_scales(values: torch.Tensor, stage_format: StageFormat, device: str) -> torch.Tensor:
    """Those that stages have."""
    shape = tuple(values.shape)
    cells = shard_moments(values, whole(shape), [stage_format.grid])[stage_format.grid]
    made = format_scales.scales(stage_format, device, cells.amax.numpy())
    return torch.from_numpy(made).view(cells_of(stage_format.grid, shape).lengths)


def any_scales(shape: Shape, stage_format: StageFormat, seed: int) -> torch.Tensor:
    """Of every size, some powers of two and some zero."""
    kind = np.random.default_rng(seed)
    lengths = cells_of(stage_format.grid, shape).lengths
    rates = np.abs(kind.standard_normal(lengths)) * 2.0 ** kind.integers(-20, 10, lengths)
    picked = np.choose(kind.integers(0, 4, lengths), [rates, rates, np.exp2(np.round(np.log2(rates))), 0 * rates])
    return torch.from_numpy(picked.astype(np.float32))


def of_the_engine(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What a reader of the whole tensor writes, matrix by matrix."""
    rows, columns = values.shape[-2:]
    row_cell, column_cell = CELLS[scheme.granularity.grid]
    made = torch.empty(values.shape, dtype=getattr(torch, scheme.live))
    count = values[..., 0, 0].numel()
    per_matrix = 0 if scheme.granularity.grid is Grid.TENSOR else scales.numel() // count
    moves = [
        Move(
            number * rows * columns * 2, columns, 1, rows, columns,
            made.data_ptr() + number * rows * columns, columns, 1,
            str(values.dtype).removeprefix("torch."), scheme.live, scheme.treatment,
            Scales(scales.data_ptr() + 4 * number * per_matrix, row_cell, column_cell, row_stride=scales.shape[-1]),
        )
        for number in range(count)
    ]  # fmt: skip
    assert table(moves)
    run_moves(moves, values.contiguous().view(torch.uint8).view(-1))
    return made


def assert_same_bytes(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found.view(torch.uint8).cpu(), wanted.view(torch.uint8))


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Box]]:
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(["bfloat16", "float16"]))
    return values_of(shape, dtype, draw(st.integers(0, 2**31))), draw(cuts(shape))


@by_format
@settings(deadline=None, max_examples=30)
@given(cut_tensors(), st.sampled_from(["cuda", "cpu", "any"]), st.integers(0, 2**31))
def test_boxes_are_quantized_to_the_bytes_that_a_reader_makes_of_the_whole_tensor(
    stage_format: StageFormat, tensor: tuple[torch.Tensor, list[Box]], rule: str, seed: int
) -> None:
    values, boxes = tensor
    shape = tuple(values.shape)
    scales = any_scales(shape, stage_format, seed) if rule == "any" else own_scales(values, stage_format, rule)
    wanted = of_the_engine(values, scales, SCHEMES[stage_format])
    for box in boxes:
        touched = scales[cells_of(stage_format.grid, shape, box).slices]
        assert_same_bytes(quantized(values[box.slices], touched, stage_format, box, shape), wanted[box.slices])


@pytest.mark.parametrize("stage_format", [each for each in StageFormat if each is not StageFormat.INT8_PER_CHANNEL])
@pytest.mark.parametrize("seed", range(4))
def test_fp8_bytes_are_also_those_of_the_engines_plain_function(stage_format: StageFormat, seed: int) -> None:
    values, box = values_of((259, 300), "bfloat16", seed), whole((259, 300))
    scales = own_scales(values, stage_format, "cuda")
    wanted = quantize(values, scales, SCHEMES[stage_format].granularity, box)
    assert_same_bytes(quantized(values, scales, stage_format, box, box.lengths), wanted)


def test_dividing_by_a_scale_is_not_multiplying_by_its_reciprocal() -> None:
    # Values that their scale divides exactly halfway between two FP8 values.
    halfway = torch.arange(8, 16) + 0.5
    values, scale = (7 * halfway).bfloat16().view(1, -1), torch.tensor([[7.0]])
    box = whole((1, 8))
    multiplied = quantized(values, scale, StageFormat.FP8_PER_TENSOR, box, box.lengths)
    divided = quantized(values, scale, StageFormat.FP8_PER_CHANNEL, box, box.lengths)
    assert not torch.equal(multiplied.view(torch.uint8), divided.view(torch.uint8))


@by_format
def test_zeros_are_quantized_to_what_stands_for_zeros(stage_format: StageFormat) -> None:
    values, box = torch.zeros(130, 140, dtype=torch.bfloat16), whole((130, 140))
    scales = own_scales(values, stage_format, "cuda")
    made = quantized(values, scales, stage_format, box, box.lengths)
    if stage_format is StageFormat.FP8_PER_TENSOR:
        assert scales.item() == 0  # whatever the bytes are
    else:
        assert not made.float().any()


@by_format
def test_values_that_are_not_the_boxs_and_scales_that_are_not_its_cells_are_refused(stage_format: StageFormat) -> None:
    values, box = values_of((130, 140), "bfloat16", 1), whole((130, 140))
    scales = own_scales(values, stage_format, "cuda")
    with pytest.raises(WrongShape, match=r"values of shape \(129, 140\)"):
        quantized(values[1:], scales, stage_format, box, box.lengths)
    with pytest.raises(WrongShape, match=r"which should be \("):
        quantized(values, scales.view(-1), stage_format, box, box.lengths)
    with pytest.raises(WrongDtype, match=r"torch\.float32"):
        quantized(values.float(), scales, stage_format, box, box.lengths)


@pytest.mark.gpu
@by_format
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_makes_the_bytes_that_a_cpu_makes(stage_format: StageFormat, shape: Shape) -> None:
    for seed in range(8):
        values = values_of(shape, "bfloat16", seed)
        for scales in (own_scales(values, stage_format, "cuda"), any_scales(shape, stage_format, seed)):
            wanted = quantized(values, scales, stage_format, whole(shape), shape)
            found = quantized(values.cuda(), scales.cuda(), stage_format, whole(shape), shape)
            assert_same_bytes(found, wanted)
