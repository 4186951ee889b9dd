# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Scales of stages that trainers quantize: bit for bit those of the engine, from cells whoever owns parts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from private_stage import PrivateStage, by_columns, by_rows, private_stage
from random_cuts import cuts
from stagingd_client.moments import shard_moments
from stagingd_vllm import schemes

from stagingd.boxes import Box
from stagingd.errors import CatalogMismatch
from stagingd.format_scales import RankLimits, scales
from stagingd.formats import Quantization, StageFormat
from stagingd.moments import Grid, StoredMoments, cell_shape, cells_of

SCHEMES = {
    StageFormat.FP8_PER_TENSOR: schemes.FP8_PER_TENSOR,
    StageFormat.FP8_PER_CHANNEL: schemes.FP8_PER_CHANNEL,
    StageFormat.FP8_PER_BLOCK: schemes.FP8_PER_BLOCK,
    StageFormat.INT8_PER_CHANNEL: schemes.INT8_PER_CHANNEL,
}
LARGEST_BITS = 0x7F7FFFFF
"""Those of the greatest finite float32; the bits of lesser magnitudes are all smaller numbers."""
EXTREMES = [
    0,
    1,
    0x7FFFFF,
    0x800000,
    LARGEST_BITS,
    *np.array([1e-4, 448, 127, 1 / 512, 65504], "f4").view("u4").tolist(),
]

by_format_and_device = pytest.mark.parametrize(
    ("stage_format", "device"), [(each, device) for each in StageFormat for device in ("cuda", "cpu")]
)


def of_the_engine(stage_format: StageFormat, device: str, limits: np.ndarray) -> np.ndarray:
    made = SCHEMES[stage_format].formula(torch.from_numpy(limits), torch.device(device))
    assert made.dtype is torch.float32
    return made.numpy()


def assert_the_engines(stage_format: StageFormat, device: str, limits: np.ndarray) -> None:
    mine = scales(stage_format, device, limits)
    assert (mine.dtype, mine.shape) == (np.float32, limits.shape)
    assert np.array_equal(mine.view(np.uint32), of_the_engine(stage_format, device, limits).view(np.uint32))


def test_the_formats_are_the_engines_schemes_by_name_and_dtype() -> None:
    for stage_format, scheme in SCHEMES.items():
        granularity = scheme.granularity
        assert (stage_format, stage_format.dtype, stage_format.grid) == (scheme.name, scheme.live, granularity.grid)


@by_format_and_device
def test_of_every_magnitude_in_bf16_and_fp16_the_scale_is_the_engines(stage_format: StageFormat, device: str) -> None:
    in_bf16 = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
    in_fp16 = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    assert_the_engines(stage_format, device, np.concatenate([in_bf16, in_fp16]))


@by_format_and_device
@given(bits=st.lists(st.one_of(st.integers(0, LARGEST_BITS), st.sampled_from(EXTREMES)), min_size=1))
def test_of_any_magnitude_in_fp32_the_scale_is_the_engines(
    stage_format: StageFormat, device: str, bits: list[int]
) -> None:
    assert_the_engines(stage_format, device, np.array(bits, np.uint32).view(np.float32))


@by_format_and_device
@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (3, 4, 1)])
def test_scales_have_the_shape_of_their_limits(stage_format: StageFormat, device: str, shape: tuple[int, ...]) -> None:
    assert_the_engines(stage_format, device, np.full(shape, 3.7, np.float32))


def test_per_block_a_gpus_scales_are_not_a_cpus() -> None:
    limits = np.arange(1, 1000, dtype=np.float32)
    on_gpu, on_cpu = (scales(StageFormat.FP8_PER_BLOCK, device, limits) for device in ("cuda", "cpu"))
    assert (on_gpu != on_cpu).any()


SHAPES = {"q": (200, 140), "norm": (140,), "k": (70, 140), "experts": (3, 140, 20), "head": (30, 20)}
GROUPS = (("q", "k"), ("experts",))


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def store_moments(stage: PrivateStage, version: int, tensors: dict[str, torch.Tensor]) -> StoredMoments:
    """Store the largest magnitudes of every box as its owner does."""
    catalog, stored = stage.catalog, stage.made.moments(version % 2)
    for owned in catalog.owned:
        values = tensors[catalog.tensors[owned.tensor].name][owned.box.slices]
        for grid, cells in shard_moments(values, owned.box, catalog.grids).items():
            first = catalog.first_cell(owned, grid)
            stored.amax[first : first + cells.amax.numel()] = cells.amax.numpy()
    return stored


def largest(tensor: torch.Tensor, grid: Grid) -> np.ndarray:
    """The largest magnitude in each cell of a whole tensor."""
    shape = tuple(tensor.shape)
    found = np.zeros(cells_of(grid, shape).lengths, np.float32)
    cell = (np.arange(size) // edge for size, edge in zip(shape, cell_shape(grid, shape), strict=True))
    np.maximum.at(found, np.ix_(*cell), tensor.float().abs().numpy())
    return found


def expected(tensors: dict[str, torch.Tensor], name: str, grid: Grid, box: Box) -> np.ndarray:
    if grid is Grid.TENSOR:
        (group,) = (group for group in GROUPS if name in group)
        return np.array([max(float(tensors[member].abs().max()) for member in group)], np.float32)
    return largest(tensors[name], grid)[cells_of(grid, SHAPES[name], box).slices].ravel()


all_cuts = st.fixed_dictionaries({name: cuts(shape) for name, shape in SHAPES.items()})


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(StageFormat), all_cuts, st.permutations(Grid), st.integers(0, 2**31))
def test_limits_are_those_of_whole_cells_however_ranks_hold_the_tensors(
    stage_format: StageFormat, cut: dict[str, list[Box]], grids: list[Grid], seed: int
) -> None:
    stacks_too = stage_format is not StageFormat.FP8_PER_TENSOR
    quantization = Quantization(format=stage_format, groups=GROUPS if stacks_too else GROUPS[:1])
    with private_stage(weights(seed), cut, grids, quantization=quantization) as stage:
        catalog = stage.catalog
        ranks = [(owned, RankLimits(catalog, owned)) for owned in map(catalog.owned_by, range(catalog.ranks))]
        for version in (1, 2):
            tensors = weights(seed + version)
            stored = store_moments(stage, version, tensors)
            for boxes, limits in ranks:
                found = limits.of(stored)
                assert found.dtype == np.float32
                parts = [found[limits.slice_of(number)] for number in range(len(boxes))]
                for owned, part in zip(boxes, parts, strict=True):
                    tensor = catalog.tensors[owned.tensor]
                    if tensor.group is None:
                        assert not part.size
                    else:
                        wanted = expected(tensors, tensor.name, stage_format.grid, owned.box)
                        np.testing.assert_array_equal(part, wanted)
                assert sum(part.size for part in parts) == found.size


@pytest.mark.parametrize("cut", [by_rows, by_columns])
@pytest.mark.parametrize("stage_format", StageFormat)
def test_limits_of_shards_are_those_of_whole_cells_when_experts_are_cut_alike(
    cut: Callable[[Sequence[int], int], list[Box]], stage_format: StageFormat
) -> None:
    tensors = {f"expert{number}": weights(number)["q"] for number in range(4)}
    held = {name: [box for box in cut(tensor.shape, 3) if box.volume] for name, tensor in tensors.items()}
    quantization = Quantization(format=stage_format, groups=tuple((name,) for name in tensors))
    with private_stage(tensors, held, quantization=quantization) as stage:
        catalog, stored = stage.catalog, store_moments(stage, 0, tensors)
        limits = RankLimits(catalog, catalog.owned)
        for number, owned in enumerate(catalog.owned):
            whole = largest(tensors[catalog.tensors[owned.tensor].name], stage_format.grid)
            wanted = whole[cells_of(stage_format.grid, SHAPES["q"], owned.box).slices].ravel()
            np.testing.assert_array_equal(limits.of(stored)[limits.slice_of(number)], wanted)


def test_a_rank_that_holds_nothing_has_no_limits() -> None:
    quantization = Quantization(format=StageFormat.FP8_PER_CHANNEL, groups=GROUPS)
    with private_stage(weights(0), quantization=quantization) as stage:
        assert RankLimits(stage.catalog, ()).of(store_moments(stage, 0, weights(0))).shape == (0,)


def test_a_stage_that_holds_tensors_as_they_are_has_no_limits() -> None:
    with private_stage(weights(0)) as stage:
        with pytest.raises(CatalogMismatch, match="as they are"):
            RankLimits(stage.catalog, stage.catalog.owned)
