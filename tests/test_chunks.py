# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Chunks and copies: arithmetic only."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stagingd_client.chunks import GROUPS, Chunk, Piece, chunks, matrices
from stagingd_client.copies import Copy, coalesced, split
from stagingd_client.layout import Layout, rows_and_columns
from stagingd_client.naming import NamedShard
from stagingd_client.placement import Held

from stagingd.boxes import Box, whole
from stagingd.catalog import Catalog, TensorDeclaration, build
from stagingd.moments import ALL_GRIDS, Grid


def places(copy: Copy) -> list[tuple[int, int]]:
    """Every byte that a copy moves: to where, from where."""
    return [
        (copy.target + run * copy.target_pitch + byte, copy.source + run * copy.source_pitch + byte)
        for run in range(copy.height)
        for byte in range(copy.width)
    ]


@st.composite
def several_copies(draw: st.DrawFn) -> list[Copy]:
    """Copies side by side, as chunks have them: source and target rise, often regularly."""
    copies = []
    target = source = 0
    for _ in range(draw(st.integers(1, 12))):
        width, height = draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 1, 3]))
        pitches = width + draw(st.sampled_from([0, 4])), width
        target += draw(st.sampled_from([0, 0, 4, 300]))
        source += draw(st.sampled_from([0, 0, 4]))
        padding = draw(st.sampled_from([0, 4])) if height == 1 else 0
        copies.append(Copy(target, source, width, height, *(pitches if height > 1 else (0, 0)), padding))
        target += pitches[0] * height if height > 1 else width + padding
        source += pitches[1] * height if height > 1 else width + padding
    return copies


@settings(deadline=None)
@given(several_copies())
def test_coalesced_copies_move_the_same_bytes(copies: list[Copy]) -> None:
    wanted = [place for copy in copies for place in places(copy)]
    moved = [place for copy in coalesced(copies) for place in places(copy)]
    assert set(wanted) <= set(moved)
    assert len(moved) == len({target for target, _ in moved})  # nothing is written twice
    padding = {
        (copy.target + copy.width + byte, copy.source + copy.width + byte)
        for copy in copies
        for byte in range(copy.padding)
    }
    assert set(moved) - set(wanted) <= padding
    assert len(coalesced(copies)) <= len(copies)


@settings(deadline=None)
@given(several_copies(), st.lists(st.integers(1000, 2000), max_size=4).map(sorted))
def test_split_copies_move_the_same_bytes_and_cross_no_seam(copies: list[Copy], seams: list[int]) -> None:
    for copy in copies:
        parts = list(split(copy, 1000, seams))
        assert [place for part in parts for place in places(part)] == places(copy)
        for part in parts:
            reached = [1000 + target for target, _ in places(part)]
            assert not any(min(reached) < seam <= max(reached) for seam in seams)


def test_a_pitch_beyond_what_cuda_takes_becomes_single_runs() -> None:
    tall = Copy(0, 0, 4, 4, 2**31, 4)
    assert [part.height for part in split(tall, 0, [])] == [1, 1, 1, 1]
    assert [part.target for part in split(tall, 0, [])] == [0, 2**31, 2**32, 3 * 2**31]


def catalog_of(shapes: dict[str, tuple[int, ...]], rows: slice | None = None) -> Catalog:
    """A catalog of whole tensors, or with the given rows of each with rank 0 and the rest with rank 1."""
    ranks: list[list[TensorDeclaration]] = [[], []]
    for name, shape in shapes.items():
        if rows is None:
            boxes = [whole(shape), None]
        else:
            boxes = [
                Box((0, 0), (rows.stop, shape[1])),
                Box((rows.stop, 0), (shape[0] - rows.stop, shape[1])),
            ]
        for rank, box in zip(ranks, boxes, strict=True):
            if box is not None:
                rank.append(TensorDeclaration(name=name, dtype="bfloat16", shape=shape, boxes=(box,)))
    return build("policy", [rank for rank in ranks if rank], ALL_GRIDS)


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], int, tuple[Grid, ...]]:
    """Small tensors whose rows two ranks share, the row where they are cut at most, and the grids that are kept."""
    shapes = st.one_of(st.tuples(st.integers(2, 200)), st.tuples(st.integers(2, 9), st.integers(1, 40)))
    made = draw(st.lists(shapes, min_size=1, max_size=6))
    grids = draw(st.sets(st.sampled_from(ALL_GRIDS)))
    return {f"t{number}": shape for number, shape in enumerate(made)}, draw(st.integers(1, 9)), tuple(sorted(grids))


@settings(deadline=None)
@given(cut_tensors())
def test_no_rank_writes_what_another_one_owns(case: tuple[dict[str, tuple[int, ...]], int, tuple[Grid, ...]]) -> None:
    shapes, cut, grids = case
    ranks: list[list[TensorDeclaration]] = [[], []]
    for name, shape in shapes.items():
        first = min(cut, shape[0] - 1)
        for rank, (start, count) in zip(ranks, ((0, first), (first, shape[0] - first)), strict=True):
            box = Box((start, *(0 for _ in shape[1:])), (count, *shape[1:]))
            rank.append(TensorDeclaration(name=name, dtype="bfloat16", shape=shape, boxes=(box,)))
    catalog = build("policy", ranks, grids)
    written = [
        {
            target
            for chunk in chunks_of(catalog, rank, 2**14)
            for copy in (*chunk.copies, *chunk.cell_copies)
            for target, _ in places(copy)
        }
        for rank in (0, 1)
    ]
    assert written[0]
    assert written[1]
    assert not written[0] & written[1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40)), min_size=1, max_size=6), st.integers(20, 60))
def test_no_cell_is_copied_twice_but_the_boxs_own_which_is_written_last(
    shapes: list[tuple[int, int]], limit: int
) -> None:
    catalog = catalog_of({f"t{number}": shape for number, shape in enumerate(shapes)})
    copies = [copy for chunk in chunks_of(catalog, 0, limit * 1024) for copy in chunk.cell_copies]
    cells = [
        (target - catalog.moments_offset) // 4
        for copy in copies
        for target in range(copy.target, copy.target + copy.width, 4)
    ]
    own = {owned.first_cell for owned in catalog.owned_by(0)}
    assert set(cells) | own == set(range(catalog.cells))
    assert len(cells) == len(set(cells))


def chunks_of(catalog: Catalog, rank: int, limit: int) -> list[Chunk]:
    """What a rank flushes, with each of its boxes as a shard of its own."""
    made = []
    for number, owned in enumerate(catalog.owned_by(rank)):
        name, shape = catalog.tensors[owned.tensor].name, catalog.tensors[owned.tensor].shape
        lengths = owned.box.lengths
        layout = Layout(name, shape, owned.box, lengths, (*lengths[1:], 1), 0)
        made += matrices(number, Piece(owned, number, layout), catalog) or []
    return list(chunks(made, catalog, limit))


def test_without_rows_and_blocks_a_version_lands_in_as_many_groups() -> None:
    shapes = {f"t{number}": (128, 512) for number in range(64)}
    declared = [
        TensorDeclaration(name=name, dtype="bfloat16", shape=shape, boxes=(whole(shape),))
        for name, shape in shapes.items()
    ]
    for grids in (ALL_GRIDS, (Grid.TENSOR,)):
        cut = chunks_of(build("policy", [declared], grids), 0, 2**18)
        assert sum(chunk.begins_group for chunk in cut) == GROUPS


def copies_of(catalog: Catalog, limit: int) -> tuple[int, int]:
    """How many chunks, and copies in all, rank 0 needs."""
    cut = chunks_of(catalog, 0, limit)
    return len(cut), sum(len(chunk.copies) + len(chunk.cell_copies) for chunk in cut)


def test_eighteen_thousand_experts_take_few_copies() -> None:
    shapes = {
        f"layers.{layer}.experts.{expert}.{name}": shape
        for layer in range(48)
        for name, shape in (("gate", (768, 2048)), ("up", (768, 2048)), ("down", (2048, 768)))
        for expert in range(128)
    }
    assert len(shapes) == 18432
    chunk_count, copy_count = copies_of(catalog_of(shapes), 64 * 2**20)
    assert chunk_count < 950  # 58 GB at 64 MiB
    assert copy_count < 4 * chunk_count
    # Every expert cut by rows, as FSDP over their second dim does: still not one copy per expert.
    chunk_count, copy_count = copies_of(catalog_of(dict(list(shapes.items())[:3072]), slice(0, 384)), 64 * 2**20)
    assert copy_count < 8 * chunk_count


def view_of(values: torch.Tensor, shard: torch.Tensor, box: Box, shape: tuple[int, ...]) -> Layout:
    return Layout.of(NamedShard("w", Held(shape, box, values)), shard)


def test_rotary_rows_within_fused_groups_are_four_levels() -> None:
    groups, heads, width, columns = 3, 2, 8, 5
    native = torch.arange(groups * (heads + 2) * width * columns).view(groups, heads + 2, width, columns)
    values = native[:, :heads].unflatten(2, (width // 2, 2)).transpose(2, 3)
    shape = (groups * heads * width, columns)
    layout = view_of(values, native, whole(shape), shape)
    found = rows_and_columns(layout)
    assert found is not None
    _, order, column_stride = found
    assert order.sizes == (groups, heads, 2, width // 2)
    assert column_stride == 1
    assert torch.equal(layout.view(native), values.reshape(shape))


def test_columns_in_another_order_are_not_taken_for_rows() -> None:
    shard = torch.arange(24.0)
    values = shard.view(4, 3, 2).transpose(1, 2)
    assert rows_and_columns(view_of(values, shard, whole((4, 6)), (4, 6))) is None
