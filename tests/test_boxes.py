# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Boxes against sets of indices, which say the same thing slowly."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from stagingd.boxes import (
    Box,
    cells,
    fits,
    intersect,
    overlap_counts,
    overlapping,
    relative,
    subtract,
    uncovered,
    whole,
)

SIDE = 6


def boxes(dims: int) -> st.SearchStrategy[Box]:
    one = st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)).map(lambda ends: (min(ends), max(ends)))
    return st.lists(one, min_size=dims, max_size=dims).map(
        lambda spans: Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    )


def points(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, e) for o, e in zip(box.offsets, box.ends, strict=True))))


several = st.integers(0, 3)


@given(several.flatmap(lambda dims: st.tuples(boxes(dims), boxes(dims))))
def test_intersection_is_that_of_the_sets(pair: tuple[Box, Box]) -> None:
    common = intersect(*pair)
    assert (points(common) if common else set()) == points(pair[0]) & points(pair[1])


@given(several.flatmap(lambda dims: st.tuples(boxes(dims), boxes(dims))))
def test_subtraction_leaves_disjoint_boxes_that_are_the_difference(pair: tuple[Box, Box]) -> None:
    rest = subtract(*pair)
    assert sum(box.volume for box in rest) == len(points(pair[0]) - points(pair[1]))
    assert set().union(*map(points, rest)) == points(pair[0]) - points(pair[1])


@given(several.flatmap(lambda dims: st.lists(boxes(dims), max_size=5)))
def test_overlapping_finds_two_boxes_that_share_elements_if_there_are_any(many: list[Box]) -> None:
    found = overlapping(many)
    if found is None:
        assert all(not points(a) & points(b) for a, b in itertools.combinations(many, 2))
    else:
        first, second, common = found
        assert first != second
        assert points(common) == points(many[first]) & points(many[second]) != set()


@given(several.flatmap(lambda dims: st.lists(boxes(dims).filter(lambda b: b.volume > 0), max_size=5)))
def test_uncovered_names_a_missing_box_if_there_is_one(many: list[Box]) -> None:
    shape = (SIDE,) * (len(many[0].lengths) if many else 2)
    missing = uncovered(shape, many)
    left = points(whole(shape)) - set().union(*map(points, many))
    assert (missing is None) == (not left)
    if missing is not None:
        assert points(missing) <= left


@given(boxes(2), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_cells_and_their_counts_add_up_to_the_box(box: Box, cell: tuple[int, int]) -> None:
    if not box.volume:
        return
    touched = {tuple(i // c for i, c in zip(point, cell, strict=True)) for point in points(box)}
    assert points(cells(box, cell)) == touched
    rows, columns = overlap_counts(box, cell)
    assert sum(r * c for r in rows for c in columns) == box.volume
    assert len(rows) * len(columns) == len(touched)


def test_a_box_outside_or_of_another_rank_does_not_fit() -> None:
    assert fits(Box((1, 2), (3, 4)), (4, 6))
    assert not fits(Box((1, 2), (4, 4)), (4, 6))
    assert not fits(Box((-1, 0), (1, 1)), (4, 6))
    assert not fits(Box((0,), (1,)), (4, 6))


def test_relative_counts_from_the_origin_box() -> None:
    assert relative(Box((5, 7), (2, 2)), Box((4, 4), (8, 8))) == Box((1, 3), (2, 2))
    assert str(Box((1, 3), (2, 2))) == "[1:3, 3:5]"
