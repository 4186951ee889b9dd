# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moves by way of buffers write what they write from the slot itself; and what a copy engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from move_sets import WIDE, MoveSet, aligned, move_sets
from stagingd_vllm.crossings import GAP, NARROWEST, Copy, Crossings, crossings
from stagingd_vllm.move_reference import run_moves
from stagingd_vllm.moves import Move, Treatment, table

BUFFER = 16 * 1024


def matrix(rows: int, columns: int) -> Move:
    return Move(0, columns, 1, rows, columns, 4096, columns, 1, "bfloat16", "bfloat16", Treatment.COPY)


def crossed(made: Sequence[Move], size: int, narrowest: int, registered: int, slot: torch.Tensor) -> Crossings:
    """Carry moves out by way of a buffer, which holds what the crossing before has left."""
    buffer = torch.full((size,), 0x5A, dtype=torch.uint8)
    cut = crossings(made, size, narrowest, registered)
    for crossing in cut.buffered:
        for copy in crossing.copies:
            rows = slot[copy.source :].as_strided((copy.rows, copy.width), (copy.pitch, 1))
            buffer[copy.place : copy.place + copy.bytes] = rows.reshape(-1)
        run_moves(crossing.moves, buffer)
    run_moves(cut.direct, slot)
    return cut


@settings(deadline=None, max_examples=150)
@given(move_sets(), st.integers(2048, BUFFER), st.sampled_from((4096, 2**40)), st.sampled_from((1, 64, NARROWEST)))
def test_live_memory_is_the_same_whichever_way_the_bytes_cross(
    made: MoveSet, size: int, registered: int, narrowest: int
) -> None:
    live, expected = aligned(made.live.numel()), aligned(made.live.numel())
    for memory in (live, expected):
        memory.copy_(made.live)
    crossed(made.at(live.data_ptr()), size, narrowest, registered, made.slot)
    run_moves(made.at(expected.data_ptr()), made.slot)
    assert torch.equal(live, expected)


@settings(deadline=None)
@given(move_sets(), st.integers(2048, BUFFER), st.sampled_from((4096, 2**40)))
def test_every_copy_fits_its_buffer_and_one_registration_and_no_two_lie_upon_each_other(
    made: MoveSet, size: int, registered: int
) -> None:
    for crossing in crossings(made.moves, size, 1, registered).buffered:
        end = 0
        for copy in crossing.copies:
            assert copy.place >= end
            assert copy.place % 256 == copy.source % 256
            assert (
                copy.source // registered == (copy.source + copy.pitch * (copy.rows - 1) + copy.width - 1) // registered
            )
            end = copy.place + copy.bytes
        assert end <= size
        assert crossing.bytes <= size


def test_neighbours_are_one_copy_and_what_lies_far_apart_is_not() -> None:
    def copies(*sources: int, registered: int = 1 << 30) -> list[Copy]:
        moves = [replace(matrix(64, 64), source=source) for source in sources]
        (only,) = crossings(moves, 1 << 20, registered=registered).buffered
        return list(only.copies)

    size = 64 * 64 * 2
    assert copies(0, size) == [Copy(0, 2 * size, 2 * size, 1, 0)]
    assert copies(0, size + 512) == [Copy(0, 2 * size + 512, 2 * size + 512, 1, 0)]
    assert len(copies(0, size + GAP)) == 2
    assert len(copies(0, size, registered=size)) == 2
    assert len(copies(0, 0)) == 2, "what is read twice lies in the buffer twice"


def test_a_part_of_each_row_is_one_copy_and_lies_packed() -> None:
    part = replace(matrix(40, 1024), source=2048, source_row=4096)
    (only,) = crossings([part], 1 << 20).buffered
    assert only.copies == (Copy(2048, 8192, 2048, 40, 0),)
    assert only.moves == (replace(part, source=0, source_row=1024),)


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(replace(matrix(40, NARROWEST // 2 - 8), source_row=4096), id="narrow rows"),
        pytest.param(replace(matrix(40, 1024), source_row=1, source_column=40), id="columns"),
        pytest.param(replace(matrix(40, 1024), source_row=512), id="rows that overlap"),
    ],
)
def test_what_the_copy_engine_takes_slowly_or_not_at_all_is_left_to_a_kernel(move: Move) -> None:
    assert crossings([move], 1 << 20) == Crossings((), (move,))


@pytest.mark.parametrize("name", sorted(WIDE))
def test_what_was_aligned_in_the_slot_is_aligned_in_the_buffer(name: str) -> None:
    made = WIDE[name].at(4096)
    aligned_before = {found.kind.aligned for found in table(made)}
    for crossing in crossings(made, BUFFER, 1).buffered:
        assert {found.kind.aligned for found in table(crossing.moves)} == aligned_before
