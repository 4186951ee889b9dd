# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moments of shards, merged, against numpy in float64 on the whole tensor."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stagingd_client.moments import shard_moments

from stagingd.boxes import Box, relative
from stagingd.moments import (
    ALL_GRIDS,
    Grid,
    Moments,
    cell_shape,
    cells_of,
    elements_per_cell,
    merge_boxes,
)

SHAPES = [(1,), (5,), (300,), (1, 1), (7, 130), (130, 7), (256, 256), (259, 300), (3, 140, 20), (2, 3, 5, 129)]


def as_moments(values: torch.Tensor, box: Box, shape: tuple[int, ...], grid: Grid) -> Moments:
    found = shard_moments(values, box, [grid])[grid]
    lengths = cells_of(grid, shape, box).lengths
    count, mean, m2, amax, nonfinite = (field.numpy().reshape(lengths) for field in found.fields)
    return Moments(count.astype(np.int64), mean, m2, amax, nonfinite)


def expected(tensor: torch.Tensor, grid: Grid) -> Moments:
    """Cell by cell, in float64."""
    shape = tuple(tensor.shape)
    cell, region = cell_shape(grid, shape), cells_of(grid, shape)
    result = Moments.empty(region.lengths)
    values = tensor.double().numpy()
    for index in np.ndindex(*region.lengths):
        part = values[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, cell, strict=True))]
        finite = part[np.isfinite(part)]
        result.count[index], result.nonfinite[index] = finite.size, part.size - finite.size
        if finite.size:
            result.mean[index], result.amax[index] = finite.mean(), np.abs(finite).max()
            result.m2[index] = ((finite - finite.mean()) ** 2).sum()
    return result


def assert_same(found: Moments, wanted: Moments) -> None:
    np.testing.assert_array_equal(found.count, wanted.count)
    np.testing.assert_array_equal(found.nonfinite, wanted.nonfinite)
    np.testing.assert_array_equal(found.amax, wanted.amax)  # exact
    scale = np.sqrt(wanted.variance) + np.abs(wanted.mean) + 1e-12
    assert (np.abs(found.mean - wanted.mean) <= 1e-5 * scale).all()
    assert (np.abs(found.m2 - wanted.m2) <= 1e-4 * (wanted.m2 + 1e-9 * wanted.count * scale**2)).all()


def tensor_of(shape: tuple[int, ...], seed: int, mean: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02 + mean).bfloat16()


cuts = st.lists(st.floats(0, 1), max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from([0.0, 1.0, -3.0]), cuts, st.sampled_from(ALL_GRIDS)
)
def test_merged_moments_of_uneven_shards_are_those_of_the_whole(
    shape: tuple[int, ...], seed: int, mean: float, where: list[float], grid: Grid
) -> None:
    tensor = tensor_of(shape, seed, mean)
    dim = seed % len(shape)
    edges = sorted({0, shape[dim], *(round(cut * shape[dim]) for cut in where)})
    parts = []
    for start, stop in itertools.pairwise(edges):
        offsets, lengths = [0] * len(shape), list(shape)
        offsets[dim], lengths[dim] = start, stop - start
        box = Box(tuple(offsets), tuple(lengths))
        parts.append((cells_of(grid, shape, box), as_moments(tensor[box.slices], box, shape, grid)))
    assert_same(merge_boxes(cells_of(grid, shape), parts), expected(tensor, grid))


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_non_finite_values_are_counted_and_left_out(grid: Grid) -> None:
    tensor = tensor_of((200, 150), 1, 0.5)
    tensor[3, 5], tensor[3, 6], tensor[199, 149], tensor[130] = float("nan"), float("inf"), float("-inf"), float("nan")
    box = Box((0, 0), (200, 150))
    found = as_moments(tensor, box, (200, 150), grid)
    assert_same(found, expected(tensor, grid))
    assert found.nonfinite.sum() == 153


def test_a_mean_of_means_would_be_wrong_and_is_not_what_merging_gives() -> None:
    tensor = torch.cat([torch.zeros(9, 4), torch.ones(1, 4)]).bfloat16()
    parts = [
        (cells_of(Grid.TENSOR, (10, 4), box), as_moments(tensor[box.slices], box, (10, 4), Grid.TENSOR))
        for box in (Box((0, 0), (9, 4)), Box((9, 0), (1, 4)))
    ]
    merged = merge_boxes(cells_of(Grid.TENSOR, (10, 4)), parts)
    assert merged.mean.item() == pytest.approx(0.1)
    assert merged.variance.item() == pytest.approx(0.09)


@given(st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from(ALL_GRIDS))
def test_elements_per_cell_add_up_to_the_box(shape: tuple[int, ...], seed: int, grid: Grid) -> None:
    rng = np.random.default_rng(seed)
    offsets = tuple(int(rng.integers(0, n)) for n in shape)
    box = Box(offsets, tuple(int(rng.integers(1, n - o + 1)) for n, o in zip(shape, offsets, strict=True)))
    counts = elements_per_cell(grid, shape, box)
    assert counts.shape == cells_of(grid, shape, box).lengths
    assert counts.sum() == box.volume
    assert relative(box, box).offsets == (0,) * len(shape)
