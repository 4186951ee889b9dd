# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""All that a worker does with every version, worked out once: what is moved, and what its scales are made of."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stagingd.boxes import Shape
from stagingd.catalog import Catalog, StagedTensor
from stagingd.dtypes import ITEM_BYTES
from stagingd.formats import QUANTIZED_FROM
from stagingd_vllm.layouts import Home
from stagingd_vllm.limits import Cells, Limits, cells_of_matrix
from stagingd_vllm.matrices import Matrix, matrices, padded
from stagingd_vllm.moves import Move, Scales, Treatment
from stagingd_vllm.plan import PlanEntry, PlanRefused, ReadPlan
from stagingd_vllm.prequantized import refuse_unfit
from stagingd_vllm.scales import Granularity, ScaleRule
from stagingd_vllm.schemes import Scheme

PARTS = 8
"""The scales of the first part are worked out before its bytes cross, those of the others meanwhile."""

PARTS_BESIDE = 16
"""As many as flushes have groups, about: what has landed is read while the next part lands."""

PARTS_QUANTIZED = 48
"""Where trainers quantize: the bytes land chunk by chunk then, and a part's scales are set before."""

WHOLE_BYTES = 2**25
"""Smaller reads are not cut: there would be many where a model has many trainer ranks."""

_CELL = {Granularity.TENSOR: (0, 0), Granularity.CHANNEL: (1, 0), Granularity.BLOCK: (128, 128)}


@dataclass(frozen=True)
class ScaleSpan:
    """The scales of one parameter, among all of the worker's.

    Attributes:
        home: the parameter's.
        scheme: the home's.
        first: number of its first scale.
        from_slice: whether some are found in the worker's own slice (``Recipe.peaks``).
    """

    home: Home
    scheme: Scheme
    first: int
    from_slice: bool

    @property
    def count(self) -> int:
        """How many there are."""
        assert self.home.scale is not None
        return self.home.scale.numel()


@dataclass(frozen=True)
class Recipe:
    """What to do with a version.

    Attributes:
        moves: what is written to weights.
        peaks: whose greatest magnitudes are put where their scales will be, before that.
        limits: for all scales that moments tell.
        spans: the scales, in the order of their numbers: scheme by scheme, those that are found in slices last.
    """

    moves: tuple[Move, ...]
    peaks: tuple[Move, ...]
    limits: Limits
    spans: tuple[ScaleSpan, ...]


def in_parts(plan: ReadPlan, homes: Mapping[str, Home], parts: int = PARTS) -> Iterator[ReadPlan]:
    """A plan's reads, cut into plans of whole parameters of about equal bytes; first one of all that has no scale.

    Args:
        plan: what is read in boxes.
        homes: where its parameters live.
        parts: how many there shall be of what has scales, at most.
    """
    plain = [entry for entry in plan.entries if homes[entry.region.parameter].scheme is None]
    if plain:
        yield replace(plan, entries=tuple(plain))
    quantized = [entry for entry in plan.entries if homes[entry.region.parameter].scheme is not None]
    yield from _cut(plan, _by_parameter(quantized), parts)


def in_slot_order(plan: ReadPlan, homes: Mapping[str, Home], catalog: Catalog) -> Iterator[ReadPlan]:
    """A plan's reads, cut into plans of about equal bytes, in the order in which they are flushed.

    What has scales is read parameter by parameter, other reads are cut as trainers' boxes are: these land one by one.

    Args:
        plan: what is read in boxes.
        homes: where its parameters live.
        catalog: the stage's.
    """
    parts = PARTS_BESIDE if catalog.format is None else PARTS_QUANTIZED
    scaled = [entry for entry in plan.entries if homes[entry.region.parameter].scheme is not None]
    plain = [entry for entry in plan.entries if homes[entry.region.parameter].scheme is None]
    reads = _by_parameter(scaled) + [[some] for entry in plain for some in _as_it_lands(entry, catalog)]

    def last(entries: list[PlanEntry]) -> tuple[int, Shape]:
        return max((catalog.position(entry.tensor), entry.source.ends) for entry in entries)

    yield from _cut(plan, sorted(reads, key=last), parts)


def _as_it_lands(entry: PlanEntry, catalog: Catalog) -> Iterator[PlanEntry]:
    """A read, cut at the first rows of trainers' boxes if it is large."""
    if entry.bytes <= WHOLE_BYTES:
        yield entry
        return
    start, end = entry.source.offsets[0], entry.source.ends[0]
    firsts = {owned.box.offsets[0] for owned in catalog.owned_of(entry.tensor)}
    edges = [start, *sorted(first for first in firsts if start < first < end), end]
    for first, until in itertools.pairwise(edges):
        yield entry.rows(first - start, until - first)


def _by_parameter(entries: Iterable[PlanEntry]) -> list[list[PlanEntry]]:
    found: dict[str, list[PlanEntry]] = {}
    for entry in entries:
        found.setdefault(entry.region.parameter, []).append(entry)
    return list(found.values())


def _cut(plan: ReadPlan, parameters: Sequence[list[PlanEntry]], parts: int) -> Iterator[ReadPlan]:
    """The reads of parameters, in their order."""
    size = sum(entry.bytes for entries in parameters for entry in entries)
    part: list[PlanEntry] = []
    passed = number = 0
    for entries in parameters:
        part += entries
        passed += sum(entry.bytes for entry in entries)
        if passed * parts >= (number + 1) * size:
            yield replace(plan, entries=tuple(part))
            part, number = [], passed * parts // size


def make_recipe(plan: ReadPlan, homes: Mapping[str, Home], catalog: Catalog, rule: ScaleRule) -> Recipe:
    """Work out what to do.

    What trainers have quantized is copied; its scales are made of moments as those of other tensors are.

    Args:
        plan: what is read in boxes, and to which region of which parameter, as the loader sees it.
        homes: where these parameters live.
        catalog: the stage's.
        rule: how scales follow from moments.

    Raises:
        PlanRefused, OutOfOrder: something cannot be done; names the tensor and the parameter.
    """
    cut = [
        (matrix, homes[entry.region.parameter])
        for entry in plan.entries
        for matrix in _matrices(entry, plan.shapes, homes[entry.region.parameter], catalog)
    ]
    refuse_unfit(cut, catalog, rule)
    moves, peaks, sliced = [], [], set[str]()
    made: list[tuple[str, int, Cells]] = []
    for matrix, home in cut:
        parameter = matrix.entry.region.parameter
        move = _move(matrix, home, catalog)
        moves.append(move)
        if home.scheme is None:
            continue
        found = cells_of_matrix(matrix, home.scheme.granularity, home.weight.shape[-1], catalog)
        if found is None:
            peaks.append(replace(move, treatment=Treatment.PEAK))
            sliced.add(parameter)
        else:
            made.append((parameter, _leading(matrix, home), found))
    spans = _spans(plan, homes, sliced)
    cells = [
        Cells(found.scale + spans[parameter].first + leading, found.cell, found.count)
        for parameter, leading, found in made
    ]
    count = sum(span.count for span in spans.values())
    return Recipe(tuple(moves), tuple(peaks), Limits(cells, count, rule), tuple(spans.values()))


def _matrices(entry: PlanEntry, shapes: Mapping[str, Shape], home: Home, catalog: Catalog) -> Iterator[Matrix]:
    live = tuple(home.weight.shape)
    shape = shapes.get(entry.region.parameter, live)
    if not home.takes(shape):
        raise PlanRefused(
            f"{entry.region.parameter} has shape {shape} for the loader and lives as {live}",
            remedy="detach from the stage and attach again",
            parameter=entry.region.parameter,
        )
    for matrix in matrices(entry, catalog.tensor(entry.tensor).shape, shape):
        if shape == live:
            yield matrix
        else:
            yield from padded(matrix, shape[-2] // home.parts, live[-2] // home.parts)


def _spans(plan: ReadPlan, homes: Mapping[str, Home], sliced: Collection[str]) -> dict[str, ScaleSpan]:
    """The scales of each quantized parameter."""
    quantized = [
        (scheme, name in sliced, name) for name in plan.parameters if (scheme := homes[name].scheme) is not None
    ]
    spans, at = {}, 0
    for scheme, from_slice, name in sorted(quantized, key=lambda one: (one[0].name, one[1])):
        spans[name] = ScaleSpan(homes[name], scheme, at, from_slice)
        at += spans[name].count
    return spans


def _leading(matrix: Matrix, home: Home) -> int:
    """How many scales lie before those of the matrix's leading index."""
    assert home.scale is not None
    return sum(i * stride for i, stride in zip(matrix.leading, home.scale.stride(), strict=False))


def _move(matrix: Matrix, home: Home, catalog: Catalog) -> Move:
    tensor = catalog.tensor(matrix.entry.tensor)
    weight = home.weight if home.weight.dim() > 1 else home.weight.view(1, -1)
    at = (*matrix.leading, matrix.row, matrix.column)
    offset = sum(i * stride for i, stride in zip(at, weight.stride(), strict=True))
    live = str(weight.dtype).removeprefix("torch.")
    treatment = _treatment(matrix, home.scheme, tensor, live)
    return Move(
        source=tensor.offset + matrix.source * ITEM_BYTES[tensor.dtype],
        source_row=matrix.source_row,
        source_column=matrix.source_column,
        rows=matrix.rows,
        columns=matrix.columns,
        target=weight.data_ptr() + offset * weight.element_size(),
        target_row=weight.stride(-2),
        target_column=weight.stride(-1),
        staged=tensor.dtype,
        live=live,
        treatment=treatment,
        scales=None if home.scheme is None or treatment is Treatment.COPY else _scales(matrix, home, home.scheme),
    )


def _treatment(matrix: Matrix, scheme: Scheme | None, tensor: StagedTensor, live: str) -> Treatment:
    if tensor.quantized_from is not None:
        return Treatment.COPY
    if scheme is None:
        return Treatment.COPY if tensor.dtype == live else Treatment.CONVERT
    # Anything else the engine would round to its own dtype before.
    if tensor.dtype not in QUANTIZED_FROM:
        raise PlanRefused(
            f"{matrix.entry.tensor} is staged as {tensor.dtype}, and {matrix.entry.region.parameter} is {scheme.name}",
            remedy="stage it as bfloat16: the engine would round it before it quantizes",
            tensor=matrix.entry.tensor,
            parameter=matrix.entry.region.parameter,
        )
    return scheme.treatment


def _scales(matrix: Matrix, home: Home, scheme: Scheme) -> Scales:
    assert home.scale is not None
    row_cell, column_cell = _CELL[scheme.granularity]
    return Scales(
        address=home.scale.data_ptr() + _leading(matrix, home) * home.scale.element_size(),
        row_cell=row_cell,
        column_cell=column_cell,
        first_row=matrix.row,
        first_column=matrix.column,
        row_stride=home.scale.shape[-1] if scheme.granularity is Granularity.BLOCK else 1,
    )
