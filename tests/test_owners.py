# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Replicas share their boxes out by rows: every element is written once, and every rank writes as much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagingd import owners
from stagingd.boxes import Box, Shape, intersect, overlapping, uncovered, whole
from stagingd.catalog import TensorDeclaration, build
from stagingd.dtypes import ITEM_BYTES
from stagingd.moments import ALL_GRIDS, BLOCK
from stagingd.owners import LANDING_BYTES, MOST_PARTS, PIECE_BYTES, HeldBox, Part, choose_owners


def held(box: Box, ranks: int, name: str = "w") -> HeldBox:
    return HeldBox(name, box, tuple(range(ranks)), 2)


def loads(parts: list[Part]) -> Counter[int]:
    found: Counter[int] = Counter()
    for part in parts:
        found[part.rank] += part.box.volume * 2
    return found


def grid_of(shape: Shape, parts: Shape) -> Iterator[Box]:
    """The boxes of a mesh of ranks that cut every dim into chunks of the same size, the last ones short or empty."""
    for number in range(math.prod(parts)):
        rest, offsets, lengths = number, list[int](), list[int]()
        for size, count in zip(reversed(shape), reversed(parts), strict=True):
            rest, index = divmod(rest, count)
            chunk = -(-size // count)
            offsets.insert(0, min(index * chunk, size))
            lengths.insert(0, min(chunk, size - offsets[0]))
        yield Box(tuple(offsets), tuple(lengths))


@st.composite
def declarations(draw: st.DrawFn) -> list[list[TensorDeclaration]]:
    """Tensors of a byte to gigabytes on up to 12 ranks: cut over some mesh axes, replicated over the rest."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    by_rank: list[list[TensorDeclaration]] = [[] for _ in range(ranks)]
    for index in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.sampled_from([1, 2, 3, 60, 128, 300, 1000, 1024]), min_size=1, max_size=3))
        shards = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
        parts = [1] * len(shape)
        parts[draw(st.integers(0, len(shape) - 1))] = shards
        dtype = draw(st.sampled_from(["bfloat16", "float32"]))
        for rank, box in zip(range(ranks), list(grid_of(tuple(shape), tuple(parts))) * (ranks // shards), strict=True):
            mine = (box,) if box.volume else ()
            by_rank[rank].append(TensorDeclaration(name=f"t{index}", dtype=dtype, shape=tuple(shape), boxes=mine))
    return by_rank


@given(declarations())
def test_every_element_is_owned_once_by_a_rank_that_holds_it(ranks: list[list[TensorDeclaration]]) -> None:
    catalog = build("policy", ranks, ALL_GRIDS)
    assert catalog == build("policy", ranks, ALL_GRIDS)
    for index, tensor in enumerate(catalog.tensors):
        owned = catalog.owned_of(tensor.name)
        boxes = [one.box for one in owned]
        assert overlapping(boxes) is None
        assert uncovered(tensor.shape, boxes) is None
        for one in owned:
            assert any(intersect(one.box, box) == one.box for box in ranks[one.rank][index].boxes)


def test_replicas_share_a_large_box_by_blocks_of_rows() -> None:
    parts = choose_owners([held(whole((4096, 1024)), 4)])
    assert [(part.rank, part.box) for part in parts] == [
        (rank, Box((rank * 1024, 0), (1024, 1024))) for rank in range(4)
    ]


def test_cuts_fall_on_blocks_of_the_tensor_and_not_of_the_shard() -> None:
    parts = choose_owners([held(Box((100, 0), (5000, 1024)), 3)])
    assert len(parts) == 3
    assert all(part.box.offsets[0] % BLOCK == 0 for part in parts[1:])


def test_stacked_experts_are_cut_between_experts() -> None:
    parts = choose_owners([held(whole((16, 256, 1024)), 8)])
    assert {part.box.lengths for part in parts} == {(2, 256, 1024)}


def test_few_experts_are_cut_between_blocks_of_their_rows() -> None:
    parts = choose_owners([held(whole((2, 1024, 1024)), 4)])
    assert {part.box.lengths for part in parts} == {(2, 256, 1024)}


def test_a_large_box_of_one_rank_is_cut_between_blocks_so_that_parts_of_it_land() -> None:
    box = Box((1000, 0), (100_000, 4096))
    parts = choose_owners([held(box, 1)])
    assert len(parts) == -(-box.volume * 2 // LANDING_BYTES)
    assert {part.rank for part in parts} == {0}
    assert all(part.box.offsets[0] % BLOCK == 0 for part in parts[1:])
    assert uncovered((101_000, 4096), [part.box for part in parts] + [Box((0, 0), (1000, 4096))]) is None
    assert overlapping([part.box for part in parts]) is None
    assert max(part.box.volume * 2 for part in parts) < 1.05 * LANDING_BYTES


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=3), st.integers(0, 300), st.integers(1, 3), st.integers(1, 2**17)
)
def test_whatever_is_cut_for_landing_is_all_of_it_once(shape: list[int], first: int, ranks: int, limit: int) -> None:
    box = Box((first, *(0 for _ in shape[1:])), tuple(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "LANDING_BYTES", limit)
        parts = choose_owners([held(box, ranks)])
    before = [Box((0,) * len(shape), (first, *shape[1:]))] if first else []
    assert uncovered(box.ends, [*before, *(part.box for part in parts)]) is None
    assert overlapping([part.box for part in parts]) is None
    assert all(part.box.volume for part in parts)


def test_boxes_of_any_size_and_number_are_cut_into_few_parts() -> None:
    for count in (1, 5000):
        parts = choose_owners([held(whole((1 << 60,)), 1, name=f"w{number}") for number in range(count)])
        assert count <= len(parts) <= count + MOST_PARTS


def test_rows_of_a_single_block_are_cut_anywhere() -> None:
    parts = choose_owners([held(Box((128, 0), (128, 1 << 16)), 2)])
    assert {part.box.lengths for part in parts} == {(64, 1 << 16)}


def test_a_small_box_stays_whole_with_the_least_loaded() -> None:
    small = whole((PIECE_BYTES // 256, 128))
    parts = choose_owners([HeldBox("own", whole((1000, 128)), (0,), 2), held(small, 3), held(small, 3, "again")])
    assert [(part.box, part.rank) for part in parts[1:]] == [(small, 1), (small, 2)]


def test_a_rank_with_much_of_its_own_gets_less_or_nothing() -> None:
    own = HeldBox("own", whole((4096, 1024)), (0,), 2)
    some = HeldBox("some", whole((1024, 1024)), (1,), 2)
    shared = held(whole((5120, 1024)), 3)
    assert loads(choose_owners([own, some, shared])) == {0: 8 << 20, 1: 6 << 20, 2: 6 << 20}


def llama_8b() -> dict[str, Shape]:
    """Names and shapes of Llama 3.1 8B."""
    layer: dict[str, Shape] = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
        "input_layernorm": (4096,),
        "post_attention_layernorm": (4096,),
    }
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in layer.items()}
    vocabulary = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
    return vocabulary | layers | {"model.norm.weight": (4096,)}


@pytest.mark.parametrize(("replicas", "shards"), [(2, 4), (4, 2), (8, 1), (1, 8), (8, 8)])
def test_the_ranks_of_a_replicated_llama_have_the_same_bytes_to_write(replicas: int, shards: int) -> None:
    ranks: list[list[TensorDeclaration]] = [[] for _ in range(replicas * shards)]
    for name, shape in llama_8b().items():
        cut = tuple(grid_of(shape, (shards,) + (1,) * (len(shape) - 1)))
        for rank, mine in enumerate(ranks):
            box = cut[rank % shards]
            mine.append(TensorDeclaration(name=name, dtype="bfloat16", shape=shape, boxes=(box,)))
    catalog = build("policy", ranks, ALL_GRIDS)
    written = [sum(owned.box.volume for owned in catalog.owned_by(rank)) for rank in range(len(ranks))]
    assert sum(written) * ITEM_BYTES["bfloat16"] == catalog.tensor_bytes
    assert max(written) < 1.01 * min(written)
    if replicas > 1:
        owners = {owned.rank for owned in catalog.owned_of("model.layers.7.mlp.up_proj.weight")}
        assert owners == set(range(len(ranks)))
