# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What ranks declare, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagingd.aliases import Alias
from stagingd.boxes import Box, whole
from stagingd.catalog import ALIGNMENT, Catalog, TensorDeclaration, build
from stagingd.errors import (
    BoxDoubled,
    BoxMissing,
    BoxOutside,
    CatalogMismatch,
    StagingError,
    UnknownTensor,
    WrongDtype,
    WrongShape,
)
from stagingd.formats import Quantization, StageFormat
from stagingd.moments import ALL_GRIDS, Grid

SHAPE = (10, 6)


def declared(
    *boxes: Box, name: str = "w", dtype: str = "bfloat16", shape: tuple[int, ...] = SHAPE
) -> TensorDeclaration:
    return TensorDeclaration(name=name, dtype=dtype, shape=shape, boxes=boxes)


def rows(start: int, stop: int) -> Box:
    return Box((start, 0), (stop - start, SHAPE[1]))


def refusal(*ranks: list[TensorDeclaration]) -> StagingError:
    with pytest.raises(StagingError) as caught:
        build("policy", ranks, ALL_GRIDS)
    return caught.value


def test_a_missing_box_is_named() -> None:
    error = refusal([declared(rows(0, 4))], [declared(rows(6, 10))])
    assert isinstance(error, BoxMissing)
    assert error.context["box"] == rows(4, 6)
    assert "'w'" in str(error)


def test_a_tensor_that_nobody_holds_is_missing() -> None:
    assert isinstance(refusal([declared()]), BoxMissing)


def test_overlapping_boxes_are_doubled() -> None:
    error = refusal([declared(rows(0, 6))], [declared(rows(5, 10))])
    assert isinstance(error, BoxDoubled)
    assert error.context["box"] == rows(5, 6)
    assert "ranks 0 and 1" in str(error)


def test_a_box_declared_twice_by_one_rank_is_doubled() -> None:
    assert isinstance(refusal([declared(whole(SHAPE), whole(SHAPE))]), BoxDoubled)


def test_a_tensor_declared_twice_by_one_rank_is_doubled() -> None:
    assert isinstance(refusal([declared(rows(0, 5)), declared(rows(5, 10))]), BoxDoubled)


@pytest.mark.parametrize("box", [Box((5, 0), (6, 6)), Box((0,), (10,)), Box((0, 0), (0, 6)), Box((-1, 0), (1, 1))])
def test_a_box_outside_its_tensor_is_refused(box: Box) -> None:
    error = refusal([declared(box)])
    assert isinstance(error, BoxOutside)
    assert error.context["tensor"] == "w"


def test_ranks_that_disagree_on_dtype_or_shape_are_refused() -> None:
    half = [declared(rows(0, 5))]
    assert isinstance(refusal(half, [declared(rows(5, 10), dtype="float32")]), WrongDtype)
    assert isinstance(refusal(half, [declared(Box((5, 0), (5, 6)), shape=(12, 6))]), WrongShape)


def test_a_dtype_or_shape_that_cannot_be_staged_is_refused() -> None:
    assert isinstance(refusal([declared(whole(SHAPE), dtype="complex64")]), WrongDtype)
    assert isinstance(refusal([declared(shape=(0, 6))]), WrongShape)


def test_a_stage_without_any_tensor_is_refused() -> None:
    assert isinstance(refusal([], []), WrongShape)


def test_replicas_are_spread_over_their_holders_by_bytes() -> None:
    tensors = [declared(whole(SHAPE), name=f"w{i}") for i in range(6)]
    catalog = build("policy", [tensors, tensors, tensors], ALL_GRIDS)
    assert [len(catalog.owned_by(rank)) for rank in range(3)] == [2, 2, 2]


def test_an_unknown_tensor_is_refused_with_the_nearest_names() -> None:
    catalog = build("policy", [[declared(whole(SHAPE), name="model.layers.0.mlp.up_proj.weight")]], ALL_GRIDS)
    with pytest.raises(UnknownTensor, match=r"nearest names are model\.layers\.0\.mlp\.up_proj\.weight"):
        catalog.tensor("model.layers.0.mlp.upproj.weight")


def build_with(*aliases: dict[str, str]) -> Catalog:
    """Two ranks with half of the tensors "embed" and "norm" each, and the aliases of each rank."""
    ranks = [[declared(rows(5 * r, 5 * r + 5), name=name) for name in ("embed", "norm")] for r in (0, 1)]
    by_rank = [[Alias(alias=alias, name=name) for alias, name in each.items()] for each in aliases]
    return build("policy", ranks, ALL_GRIDS, by_rank)


def test_a_tensor_is_found_by_its_aliases_and_staged_once() -> None:
    catalog = build_with({"head": "embed"}, {"head": "embed", "other head": "embed"})
    assert [tensor.name for tensor in catalog.tensors] == ["embed", "norm"]
    for alias in ("head", "other head"):
        assert catalog.tensor(alias) is catalog.tensor("embed")
        assert catalog.position(alias) == 0
        assert [owned.rank for owned in catalog.owned_of(alias)] == [0, 1]
    assert {alias.alias: alias.name for alias in catalog.aliases} == {"head": "embed", "other head": "embed"}
    assert catalog.tensor_bytes == build_with().tensor_bytes


def test_a_rank_need_not_declare_the_others_aliases() -> None:
    assert build_with({}, {"head": "embed"}).tensor("head").name == "embed"


def test_ranks_that_mean_different_tensors_by_an_alias_are_refused_and_both_are_named() -> None:
    with pytest.raises(CatalogMismatch, match="'head' is another name of 'norm' on rank 1, and of 'embed' on rank 0"):
        build_with({"head": "embed"}, {"head": "norm"})


@pytest.mark.parametrize("rank", [0, 1])
def test_an_alias_that_is_a_tensors_name_is_refused(rank: int) -> None:
    with pytest.raises(CatalogMismatch, match=f"rank {rank} declares 'norm' as another name of 'embed', but it is a"):
        build_with(*[{"norm": "embed"} if r == rank else {} for r in (0, 1)])


def test_an_alias_of_no_tensor_is_refused() -> None:
    with pytest.raises(UnknownTensor, match="rank 0 declares 'head' as another name of 'embe', which no rank declares"):
        build_with({"head": "embe"}, {})


def test_an_alias_of_an_alias_is_refused() -> None:
    with pytest.raises(UnknownTensor, match="rank 1 declares 'tail' as another name of 'head'"):
        build_with({"head": "embed"}, {"tail": "head"})


def test_aliases_are_among_the_nearest_names() -> None:
    with pytest.raises(UnknownTensor, match="nearest names are lm_head"):
        build_with({"lm_head": "embed"}).tensor("lm_haed")


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 300), max_size=3), st.sampled_from(["bfloat16", "float32", "int64"])),
        min_size=1,
    ),
    st.integers(1, 4),
)
def test_tensors_and_moments_never_overlap_in_a_slot(tensors: list[tuple[list[int], str]], ranks: int) -> None:
    declarations = [
        [
            declared(*_part(tuple(s), r, ranks), name=f"t{i}", dtype=d, shape=tuple(s))
            for i, (s, d) in enumerate(tensors)
        ]
        for r in range(ranks)
    ]
    catalog = build("policy", declarations, ALL_GRIDS)
    end = 0
    for tensor in catalog.tensors:
        assert tensor.offset >= end
        assert tensor.offset % ALIGNMENT == 0
        end = tensor.offset + tensor.bytes
    assert end <= catalog.moments_offset <= catalog.slot_bytes
    starts = [owned.first_cell for owned in catalog.owned]
    assert starts == sorted(starts)
    assert [owned.rank for owned in catalog.owned] == sorted(owned.rank for owned in catalog.owned)


def _part(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[Box, ...]:
    """Rows of a tensor as FSDP2 deals them out: equal chunks, the last ones short or empty."""
    if not shape:
        return (whole(shape),)
    chunk = -(-shape[0] // ranks)
    start, stop = min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0])
    return (Box((start, *(0,) * (len(shape) - 1)), (stop - start, *shape[1:])),) if stop > start else ()


def quantizing(form: StageFormat, *groups: tuple[str, ...]) -> Quantization:
    return Quantization(format=form, groups=groups)


def test_a_quantized_tensor_is_held_in_the_formats_dtype_and_has_the_moments_of_its_values() -> None:
    tensors = [declared(whole(SHAPE), name=name) for name in ("q", "k", "embed")]
    form = StageFormat.FP8_PER_TENSOR
    made = build("policy", [tensors], ALL_GRIDS, quantization=quantizing(form, ("k", "q")))
    plain = build("policy", [tensors], ALL_GRIDS)
    held = {tensor.name: (tensor.dtype, tensor.value_dtype, tensor.has_moments) for tensor in made.tensors}
    quantized = ("float8_e4m3fn", "bfloat16", True)
    assert held == {"q": quantized, "k": quantized, "embed": ("bfloat16", "bfloat16", True)}
    assert [tensor.name for tensor in made.group_of(made.tensor("q"))] == ["q", "k"]
    assert made.cells == plain.cells
    assert made.tensor_bytes == plain.tensor_bytes - 2 * SHAPE[0] * SHAPE[1]
    assert (made.format, plain.format) == (form, None)


@pytest.mark.parametrize(
    ("tensor", "quantization", "kind", "what"),
    [
        (declared(whole(SHAPE)), quantizing(StageFormat.FP8_PER_BLOCK, ("v",)), UnknownTensor, "no rank declares it"),
        (declared(whole(SHAPE)), quantizing(StageFormat.FP8_PER_BLOCK, ("w",), ("w",)), CatalogMismatch, "two groups"),
        (
            declared(whole(SHAPE), dtype="float32"),
            quantizing(StageFormat.FP8_PER_BLOCK, ("w",)),
            WrongDtype,
            "declared with dtype 'float32'",
        ),
        (
            declared(whole((6,)), shape=(6,)),
            quantizing(StageFormat.FP8_PER_CHANNEL, ("w",)),
            WrongShape,
            r"has shape \(6,\)",
        ),
        (
            declared(whole((2, 6, 6)), shape=(2, 6, 6)),
            quantizing(StageFormat.FP8_PER_TENSOR, ("w",)),
            WrongShape,
            "a scale for each of its matrices",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    tensor: TensorDeclaration, quantization: Quantization, kind: type[StagingError], what: str
) -> None:
    with pytest.raises(kind, match=what):
        build("policy", [[tensor]], ALL_GRIDS, quantization=quantization)


def test_what_is_quantized_lies_behind_what_is_held_as_it_is() -> None:
    tensors = [declared(whole(SHAPE), name=name) for name in "abcd"]
    catalog = build("policy", [tensors], ALL_GRIDS, quantization=quantizing(StageFormat.FP8_PER_BLOCK, ("a",), ("c",)))
    assert [tensor.name for tensor in catalog.tensors] == ["b", "d", "a", "c"]
    assert [tensor.offset for tensor in catalog.tensors] == sorted(tensor.offset for tensor in catalog.tensors)


def test_what_has_no_moments_lies_last_as_it_is_flushed_last() -> None:
    counts = TensorDeclaration(name="counts", dtype="int64", shape=(5,), boxes=(whole((5,)),))
    tensors = [counts, *(declared(whole(SHAPE), name=name) for name in "ab")]
    quantization = quantizing(StageFormat.FP8_PER_BLOCK, ("a",))
    assert [tensor.name for tensor in build("policy", [tensors], ALL_GRIDS).tensors] == ["a", "b", "counts"]
    catalog = build("policy", [tensors], ALL_GRIDS, quantization=quantization)
    assert [tensor.name for tensor in catalog.tensors] == ["b", "a", "counts"]


def test_the_grid_of_the_scales_has_to_be_kept() -> None:
    quantization = quantizing(StageFormat.FP8_PER_BLOCK, ("w",))
    with pytest.raises(CatalogMismatch, match="needs moments of grid 'block'"):
        build("policy", [[declared(whole(SHAPE))]], (Grid.TENSOR, Grid.ROW), quantization=quantization)
