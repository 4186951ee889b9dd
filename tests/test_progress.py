# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a slot tells of a version that is being filled, and what trainers tell of their boxes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from private_stage import by_columns, by_rows, private_stage
from stagingd_client.landings import Landings

from stagingd.boxes import Box, intersect
from stagingd.progress import Needs, Progress, supported

RANKS = 3
TENSORS = {"a": torch.zeros(6, 4), "b": torch.zeros(4, 6), "c": torch.zeros(9, 2)}
CUT = {"a": by_rows((6, 4), RANKS), "b": by_columns((4, 6), RANKS), "c": by_rows((9, 2), RANKS)}


def progress() -> Progress:
    return Progress(memoryview(bytearray(64 * (1 + RANKS))), RANKS)


@given(order=st.permutations(range(6)))
def test_boxes_count_from_the_first_to_the_first_gap(order: list[int]) -> None:
    with private_stage(TENSORS, {name: by_rows(tensor.shape, 1) for name, tensor in TENSORS.items()}) as stage:
        landings, told = Landings(stage.made, 0), stage.made.progress(1)
        landings.begin(1, 7)
        boxes = stage.catalog.owned_by(0)
        assert len(boxes) == 3
        there: set[int] = set()
        for number in order[:3]:
            landings.land(landings.numbers_of([boxes[number % 3]]))
            there.add(number % 3)
            first_gap = next(n for n in itertools.count() if n not in there)
            assert [told.has(7, Needs((n,))) for n in range(4)] == [n <= first_gap for n in range(4)]


def test_an_attempt_before_does_not_count() -> None:
    told = progress()
    everything = Needs((2,) * RANKS)
    told.begin(1)
    for rank in range(RANKS):
        told.start(rank, 1)
        told.land(rank, 2)
    assert told.has(1, everything)
    assert told.holds(1)
    told.clear()
    assert not told.holds(1)
    told.begin(2)
    told.start(0, 2)
    told.land(1, 2)  # rank 1 has not heard of it yet
    assert not told.has(2, Needs((0, 2, 0)))
    assert not told.holds(1)


def test_all_ranks_have_to_be_there_even_for_what_one_of_them_holds() -> None:
    told = progress()
    told.begin(5)
    told.start(0, 5)
    told.land(0, 3)
    assert not told.has(5, Needs((3, 0, 0)))
    for rank in (1, 2):
        told.start(rank, 5)
    assert told.has(5, Needs((3, 0, 0)))
    assert not told.has(5, Needs((3, 1, 0)))


def test_what_is_sealed_is_all_there_whatever_trainers_tell() -> None:
    told = progress()
    told.begin(3)
    assert not told.is_measured(3)
    told.measured(3)
    assert told.is_measured(3)
    assert not told.is_sealed(3)
    told.sealed(3)
    assert told.has(3, Needs((9,) * RANKS))


def test_needs_are_of_each_rank_the_boxes_up_to_the_last_one_that_is_named() -> None:
    with private_stage(TENSORS, CUT) as stage:
        assert Needs.of(stage.catalog, ["a"]).boxes == (1, 1, 1)
        assert Needs.of(stage.catalog, ["c", "a"]).boxes == (3, 3, 3)
        assert Needs.of(stage.catalog, []).boxes == (0, 0, 0)


@given(name=st.sampled_from(sorted(TENSORS)), data=st.data())
def test_what_is_needed_of_a_rank_ends_with_its_last_box_that_has_any_of_it(name: str, data: st.DataObject) -> None:
    shape = tuple(TENSORS[name].shape)
    starts = [data.draw(st.integers(0, length - 1)) for length in shape]
    lengths = [data.draw(st.integers(1, length - start)) for start, length in zip(starts, shape, strict=True)]
    box = Box(tuple(starts), tuple(lengths))
    with private_stage(TENSORS, CUT) as stage:
        needed = Needs.of_boxes(stage.catalog, [(name, box)]).boxes
        for rank, last in enumerate(needed):
            owned = stage.catalog.owned_by(rank)
            touches = [
                stage.catalog.tensors[one.tensor].name == name and intersect(one.box, box) is not None for one in owned
            ]
            assert not any(touches[last:])
            assert last == 0 or touches[last - 1]


@pytest.mark.parametrize("seed", range(5))
def test_both_slots_and_all_ranks_have_lines_of_their_own(seed: int) -> None:
    with private_stage(TENSORS, CUT) as stage:
        places = [(slot, rank) for slot in (0, 1) for rank in range(RANKS)]
        random.Random(seed).shuffle(places)
        for slot in (0, 1):
            stage.made.progress(slot).begin(slot + 1)
        before = [
            np.frombuffer(stage.made.slot(slot), np.uint8)[: stage.catalog.progress_offset].copy() for slot in (0, 1)
        ]
        for slot, rank in places:
            landings = Landings(stage.made, rank)
            landings.begin(slot, slot + 1)
            landings.land(landings.numbers_of(stage.catalog.owned_by(rank)[: rank + 1]))
        for slot in (0, 1):
            assert stage.made.progress(slot).has(slot + 1, Needs((1, 2, 3)))
            assert not stage.made.progress(slot).has(slot + 1, Needs((1, 3, 3)))
            after = np.frombuffer(stage.made.slot(slot), np.uint8)[: stage.catalog.progress_offset]
            assert np.array_equal(before[slot], after)


def test_only_processors_that_show_stores_in_their_order_are_used() -> None:
    assert supported("x86_64")
    assert supported("AMD64")
    assert not supported("aarch64")
