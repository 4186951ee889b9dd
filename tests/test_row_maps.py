# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""However a tensor is cut, the pieces of all shards are the whole transformed tensor, each element once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from assembling import Assembly, numbered, part_of, shards_of
from hypothesis import given
from hypothesis import strategies as st
from stagingd_client.naming import NamedShard
from stagingd_client.placement import Held
from stagingd_client.row_maps import Band, Heads, band, experts, fused_qkv, gate_up, rotary, trimmed

from stagingd.errors import WrongShape

Cuts = list[set[int]]
CUTS = st.lists(st.sets(st.integers(0, 200), max_size=5), min_size=1, max_size=2)
HEADS = st.builds(
    lambda groups, per_group, half: Heads(groups * per_group, groups, 2 * half),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
)
SHAPE_BEHIND = st.sampled_from([(), (1,), (3,), (2, 2)])


def assembled(full: torch.Tensor, cuts: Cuts, of: Callable[[Held], Iterable[tuple[str, Held]]]) -> Assembly:
    """What becomes of the shards of a tensor that is cut at any of these rows and columns."""
    assembly = Assembly()
    for part in shards_of(full, cuts[: full.dim()]):
        assembly.add([NamedShard(name, piece) for name, piece in of(part)], part)
    return assembly


def assert_same(found: Assembly, wanted: dict[str, torch.Tensor]) -> None:
    tensors = found.tensors
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name


def whole_rotary(full: torch.Tensor, rows: int) -> torch.Tensor:
    """As Hugging Face's conversion of the original Llama does it."""
    return full.view(-1, rows // 2, 2, *full.shape[1:]).transpose(1, 2).reshape(full.shape)


def whole_qkv(full: torch.Tensor, heads: Heads) -> dict[str, torch.Tensor]:
    grouped = full.view(heads.groups, -1, heads.rows, *full.shape[1:])
    q, k, v = grouped.split([heads.queries_per_group, 1, 1], dim=1)
    return {"q": q.flatten(0, 2), "k": k.flatten(0, 2), "v": v.flatten(0, 2)}


@given(HEADS, SHAPE_BEHIND, CUTS)
def test_rotary_rows_cut_anywhere_are_the_rotary_rows_of_the_whole(heads: Heads, behind: tuple[int, ...], cuts: Cuts):
    full = numbered(heads.queries * heads.rows, *behind)
    found = assembled(full, cuts, lambda part: [("w", piece) for piece in rotary(part, heads.rows)])
    assert_same(found, {"w": whole_rotary(full, heads.rows)})


@given(HEADS, SHAPE_BEHIND, CUTS)
def test_fused_rows_cut_anywhere_are_q_k_and_v(heads: Heads, behind: tuple[int, ...], cuts: Cuts):
    full = numbered(heads.fused_rows, *behind)
    assert_same(assembled(full, cuts, lambda part: fused_qkv(part, heads)), whole_qkv(full, heads))


@given(HEADS, SHAPE_BEHIND, CUTS)
def test_rotary_rows_of_fused_ones_cut_anywhere_are_those_of_the_whole(
    heads: Heads, behind: tuple[int, ...], cuts: Cuts
):
    full = numbered(heads.fused_rows, *behind)
    split = whole_qkv(full, heads)

    def both(part: Held) -> Iterable[tuple[str, Held]]:
        for which, piece in fused_qkv(part, heads):
            for turned in [piece] if which == "v" else rotary(piece, heads.rows):
                yield which, turned

    wanted = {which: rows if which == "v" else whole_rotary(rows, heads.rows) for which, rows in split.items()}
    assert_same(assembled(full, cuts, both), wanted)


@given(st.integers(1, 4), st.integers(1, 6), SHAPE_BEHIND, CUTS)
def test_gate_and_up_of_all_ranks_cut_anywhere_are_gate_and_up(
    ranks: int, rows: int, behind: tuple[int, ...], cuts: Cuts
):
    gate = numbered(ranks * rows, *behind)
    up = numbered(ranks * rows, *behind, first=1000)
    stacked = torch.cat([half for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True) for half in pair])
    assert_same(assembled(stacked, cuts, lambda part: gate_up(part, ranks)), {"gate": gate, "up": up})


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.lists(st.sets(st.integers(0, 8)), max_size=3))
def test_grouped_experts_cut_anywhere_are_the_experts(count: int, rows: int, columns: int, cuts: Cuts):
    full = numbered(count, rows, columns)
    found = assembled(full, cuts, lambda part: ((str(number), piece) for number, piece in experts(part)))
    assert_same(found, {str(number): full[number] for number in range(count)})


@given(st.integers(1, 9), st.integers(0, 9), CUTS)
def test_padding_is_cut_off(rows: int, padding: int, cuts: Cuts):
    full = numbered(rows + padding, 2)
    found = assembled(full, cuts, lambda part: (("w", piece) for piece in trimmed(part, rows)))
    assert_same(found, {"w": full[:rows]})


@given(
    st.integers(1, 5).flatmap(lambda period: st.tuples(st.just(period), st.integers(0, period - 1))),
    st.integers(1, 5),
    CUTS,
)
def test_a_band_cut_anywhere_is_its_rows(place: tuple[int, int], periods: int, cuts: Cuts):
    period, offset = place
    width = period - offset if periods % 2 else 1
    full = numbered(period * periods, 2)
    found = assembled(full, cuts, lambda part: (("w", piece) for piece in band(part, Band(period, offset, width))))
    assert_same(found, {"w": full.view(periods, period, 2)[:, offset : offset + width].flatten(0, 1)})


LLAMA_8B = Heads(queries=32, groups=8, rows=128)


@pytest.mark.parametrize(
    ("start", "stop", "pieces"),
    [
        (0, 4096, 1),  # all heads
        (128, 1280, 1),  # whole heads
        (100, 1280, 3),  # cut at the start: its two halves
        (100, 1300, 5),  # cut at both ends
        (10, 20, 2),  # inside one head
        (10, 11, 1),  # one row is of one half
    ],
)
def test_a_cut_inside_a_head_costs_two_pieces(start: int, stop: int, pieces: int) -> None:
    full = torch.empty(4096, 1)
    part = next(part for part in shards_of(full, [{start, stop}]) if part.box.offsets[0] == start)
    assert len(list(rotary(part, LLAMA_8B.rows))) == pieces


@pytest.mark.parametrize(
    ("start", "stop", "pieces"),
    [
        (0, 6144, 3),  # all groups: one view of each of q, k and v
        (768, 3 * 768, 3),  # whole groups
        (0, 512, 1),  # the query heads of one group
        (512, 768, 2),  # its key and its value head
        (700, 3 * 768, 4),  # cut in a value head
        (700, 3 * 768 + 100, 5),  # and in a query head
    ],
)
def test_a_cut_inside_a_group_costs_one_piece(start: int, stop: int, pieces: int) -> None:
    full = torch.empty(LLAMA_8B.fused_rows, 1)
    part = next(part for part in shards_of(full, [{start, stop}]) if part.box.offsets[0] == start)
    assert len(list(fused_qkv(part, LLAMA_8B))) == pieces


def test_rows_of_whole_groups_are_one_view_of_the_shards_memory() -> None:
    full = numbered(LLAMA_8B.fused_rows, 2)
    (_, q), (_, k), (_, v) = fused_qkv(part_of(full), LLAMA_8B)
    assert q.values.shape == (8, 512, 2)
    assert k.values.shape == v.values.shape == (8, 128, 2)
    (turned,) = rotary(q, LLAMA_8B.rows)
    assert turned.values.shape == (8, 4, 2, 64, 2)
    assert turned.box == q.box
    assert {part.values.untyped_storage().data_ptr() for part in (q, k, v, turned)} == {
        full.untyped_storage().data_ptr()
    }


def test_heads_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(WrongShape, match="6 query heads do not divide into 4 groups"):
        Heads(queries=6, groups=4, rows=8)
