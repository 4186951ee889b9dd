# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The catalog: every tensor of a stage, who owns which box of it, and where it lies in a slot.

A slot holds each tensor once, in its global row-major layout at an aligned offset, behind the tensors the
moments, and behind these how far it has been filled (``stagingd.progress``). So any shard is written, and any
slice read, by addressing alone.
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
from pydantic import FailFast, Field, model_validator

from stagingd import aliases, boxes, moments
from stagingd.aliases import Alias
from stagingd.boxes import Box, Shape
from stagingd.dtypes import ITEM_BYTES, WITH_MOMENTS
from stagingd.errors import (
    BoxDoubled,
    BoxMissing,
    BoxOutside,
    CatalogMismatch,
    UnknownTensor,
    WrongDtype,
    WrongShape,
)
from stagingd.formats import QUANTIZED_FROM, EngineDevice, Quantization, StageFormat
from stagingd.moments import Grid
from stagingd.owners import HeldBox, Part, choose_owners
from stagingd.record import Name, Rank, Record, StageName

ALIGNMENT: Final = 256
"""Bytes: every tensor starts at a multiple, so that copies and kernels take their fast paths."""


MAX_DIMS: Final = 16
"""Dims of a tensor: no model comes near, and the cost of some checks grows with their square."""

MATRIX_DIMS: Final = 2

PROGRESS_LINE: Final = 64
"""Bytes in which the daemon, and each trainer rank, tell how far a slot has been filled: a cache line."""

MAX_BOXES: Final = 4096
"""Distinct boxes of one tensor: they are compared with each other."""

MAX_ELEMENTS: Final = 2**50
"""Elements of one tensor: beyond any machine, and far from where sizes in bytes would not fit a message."""

GridName = Annotated[Grid, Field(strict=False)]
"""A grid, also as the plain string that arrives in a message."""


_Cut = tuple[Shape, tuple[Box, ...]]
_Cover = tuple[tuple[int, int, Box] | None, Box | None]


class TensorDeclaration(Record):
    """What one rank says of a tensor: its global dtype and shape, and the boxes that this rank holds."""

    name: Name
    dtype: Annotated[str, Field(max_length=64)]
    shape: Annotated[Shape, Field(max_length=MAX_DIMS), FailFast()]
    boxes: Annotated[tuple[Box, ...], Field(max_length=MAX_BOXES), FailFast()]

    @model_validator(mode="after")
    def _boxes_are_boxes(self) -> TensorDeclaration:
        if any(max(len(box.offsets), len(box.lengths)) > MAX_DIMS for box in self.boxes):
            raise ValueError(f"a box has more than {MAX_DIMS} dims")
        if any(len(box.offsets) != len(box.lengths) for box in self.boxes):
            raise ValueError("a box has not as many offsets as lengths")
        return self


class StagedTensor(Record):
    """A tensor of a stage.

    Attributes:
        name: its name.
        dtype: in which it is held.
        shape: its global shape.
        offset: its first byte's distance from the slot's.
        quantized_from: the dtype of the values that trainers quantize; None where it is held as it is.
        group: those of one number share a scale where a scale is a whole tensor's; None where it is held as it is.
    """

    name: Name
    dtype: str
    shape: Shape
    offset: int
    quantized_from: str | None = None
    group: int | None = None

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def has_moments(self) -> bool:
        """Whether moments are kept for it: they are for floating-point weights, as they were before quantization."""
        return self.value_dtype in WITH_MOMENTS

    @property
    def value_dtype(self) -> str:
        """Of its values before quantization, which moments are of."""
        return self.quantized_from or self.dtype


class OwnedBox(Record):
    """A box that one rank writes; ``tensor`` is an index into the catalog's tensors.

    The cells of its moments follow each other, grid by grid, from ``first_cell`` on.
    """

    tensor: int
    box: Box
    rank: Rank
    first_cell: int


class Catalog(Record):
    """Every tensor of a stage and who writes what; fixed once all ranks have declared.

    Wherever a tensor is asked for by name, its aliases do as well. Where trainers quantize, it says in which
    format, and for engines on which kind of device.
    """

    stage: StageName
    ranks: int
    grids: tuple[GridName, ...]
    tensors: tuple[StagedTensor, ...]
    aliases: tuple[Alias, ...]
    owned: tuple[OwnedBox, ...]
    cells: int
    moments_offset: int
    slot_bytes: int
    format: Annotated[StageFormat, Field(strict=False)] | None = None
    device: EngineDevice = "cuda"

    @cached_property
    def _groups(self) -> Mapping[int, Sequence[StagedTensor]]:
        grouped: dict[int, list[StagedTensor]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.group is not None:
                grouped[tensor.group].append(tensor)
        return dict(grouped)

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        positions = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        return positions | {alias.alias: positions[alias.name] for alias in self.aliases}

    @cached_property
    def _owned_by_tensor(self) -> Mapping[int, Sequence[OwnedBox]]:
        grouped: dict[int, list[OwnedBox]] = defaultdict(list)
        for owned in self.owned:
            grouped[owned.tensor].append(owned)
        return grouped

    @cached_property
    def _owned_by_rank(self) -> Mapping[int, Sequence[OwnedBox]]:
        grouped: dict[int, list[OwnedBox]] = defaultdict(list)
        for owned in self.owned:
            grouped[owned.rank].append(owned)
        return dict(grouped)

    @cached_property
    def _numbers_by_tensor(self) -> Mapping[int, Sequence[int]]:
        grouped: dict[int, list[int]] = defaultdict(list)
        counts = [0] * self.ranks
        for owned in self.owned:
            counts[owned.rank] += 1
            grouped[owned.tensor].append(counts[owned.rank])
        return grouped

    @cached_property
    def tensor_cells(self) -> npt.NDArray[np.int64]:
        """Per owned box that has moments, the cell of the whole box; the grid ``tensor`` has to be kept."""
        boxes = (owned for owned in self.owned if self.tensors[owned.tensor].has_moments)
        return np.fromiter((self.first_cell(owned, Grid.TENSOR) for owned in boxes), np.int64)

    def tensor(self, name: str) -> StagedTensor:
        """The tensor of this name or alias; ``name`` of what is returned is never an alias.

        Raises:
            UnknownTensor: the stage has none; the message lists the nearest names.
        """
        return self.tensors[self.position(name)]

    def position(self, name: str) -> int:
        """Index in ``tensors`` of the tensor of this name or alias. Raises UnknownTensor."""
        if name not in self._positions:
            near = difflib.get_close_matches(name, self._positions, n=3, cutoff=0.4)
            hint = f"the nearest names are {', '.join(near)}" if near else "no name is near it"
            raise UnknownTensor(
                f"stage {self.stage!r} has no tensor {name!r}: {hint}",
                remedy="declare it before the first version, or correct the name",
                stage=self.stage,
                tensor=name,
            )
        return self._positions[name]

    def group_of(self, tensor: StagedTensor) -> Sequence[StagedTensor]:
        """The tensors that share a scale with a quantized one where a scale is a whole tensor's, itself included."""
        return (tensor,) if tensor.group is None else self._groups[tensor.group]

    def owned_of(self, name: str) -> Sequence[OwnedBox]:
        """All boxes of a tensor, with their owners: together they are the tensor. Raises UnknownTensor."""
        return self._owned_by_tensor[self.position(name)]

    def numbers_of(self, name: str) -> Sequence[int]:
        """For each box of ``owned_of``, which of its owner's boxes it is, counted from 1. Raises UnknownTensor."""
        return self._numbers_by_tensor[self.position(name)]

    def owned_by(self, rank: int) -> Sequence[OwnedBox]:
        """The boxes that a rank has to put for every version."""
        return self._owned_by_rank.get(rank, ())

    def first_cell(self, owned: OwnedBox, grid: Grid) -> int:
        """Where in the slot's cells the owned box's cells of a grid begin."""
        shape = self.tensors[owned.tensor].shape
        before = self.grids[: self.grids.index(grid)]
        return owned.first_cell + sum(moments.cells_of(g, shape, owned.box).volume for g in before)

    @property
    def progress_offset(self) -> int:
        """Where in a slot it is told how far it has been filled: its last bytes."""
        return self.slot_bytes - self.progress_bytes

    @property
    def progress_bytes(self) -> int:
        """What that takes: a line of the daemon, and one of each trainer rank."""
        return PROGRESS_LINE * (1 + self.ranks)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one version's tensors, without alignment and moments."""
        return sum(tensor.bytes for tensor in self.tensors)


def build(
    stage: str,
    declarations: Sequence[Sequence[TensorDeclaration]],
    grids: Sequence[Grid],
    aliases_by_rank: Sequence[Sequence[Alias]] = (),
    quantization: Quantization | None = None,
) -> Catalog:
    """Make the catalog from what every rank declared.

    Args:
        stage: the stage's name.
        declarations: per rank, its tensors. The order in which tensors first appear is their order in a slot; those
            that trainers quantize come behind the others, which are flushed while the scales are worked out; those
            without moments, such as counts, come last, as they are flushed last.
        grids: the grids to keep moments for.
        aliases_by_rank: per rank, further names of tensors.
        quantization: what trainers quantize, and how; nothing by default.

    Raises:
        WrongDtype, WrongShape: ranks disagree, or a dtype or shape cannot be staged, or not be quantized.
        BoxOutside, BoxDoubled, BoxMissing: the boxes do not cover each tensor exactly once. Identical
            boxes of different ranks are replicas, and each of these ranks is made the owner of some rows.
        CatalogMismatch, UnknownTensor: ranks disagree on an alias, or it is a tensor's name, or stands for none; a
            tensor that is to be quantized is not there, or named twice, or its scales need a grid that is not kept.
    """
    if not any(declarations):
        raise WrongShape(f"no rank declares any tensor of stage {stage!r}", remedy="declare at least one", stage=stage)
    holders = _holders(declarations)
    first = {tensor.name: tensor for rank in reversed(declarations) for tensor in reversed(rank)}
    order = list(dict.fromkeys(tensor.name for rank in declarations for tensor in rank))
    covers: dict[_Cut, _Cover] = {}  # thousands of experts are cut alike
    for name in order:
        _check_cover(first[name], holders[name], covers)
    parts = choose_owners(_held(first, holders))
    groups = {} if quantization is None else _groups(quantization, first, grids)
    order.sort(key=lambda name: (first[name].dtype not in WITH_MOMENTS, name in groups))
    tensors, at = [], 0
    for name in order:
        dtype, shape, group = first[name].dtype, first[name].shape, groups.get(name)
        if quantization is None or group is None:
            tensors.append(StagedTensor(name=name, dtype=dtype, shape=shape, offset=at))
        else:
            quantized = quantization.format.dtype
            tensors.append(
                StagedTensor(name=name, dtype=quantized, shape=shape, offset=at, quantized_from=dtype, group=group)
            )
        at = _aligned(at + tensors[-1].bytes)
    owned, cell_count = _place_cells(tensors, parts, grids)
    return Catalog(
        stage=stage,
        ranks=len(declarations),
        grids=tuple(grids),
        tensors=tuple(tensors),
        aliases=aliases.agreed(aliases_by_rank, first),
        owned=owned,
        cells=cell_count,
        moments_offset=at,
        slot_bytes=at + moments.stored_bytes(cell_count) + PROGRESS_LINE * (1 + len(declarations)),
        format=None if quantization is None else quantization.format,
        device="cuda" if quantization is None else quantization.device,
    )


def _groups(
    quantization: Quantization, tensors: Mapping[str, TensorDeclaration], grids: Sequence[Grid]
) -> dict[str, int]:
    """The number of the group of each tensor that is quantized."""
    grid = quantization.format.grid
    if grid not in grids:
        raise CatalogMismatch(
            f"a stage in {quantization.format} needs moments of grid {grid.value!r}, which it does not keep",
            remedy="open the stage with this grid on the trainers",
        )
    groups: dict[str, int] = {}
    for number, group in enumerate(quantization.groups):
        for name in group:
            if name in groups:
                raise CatalogMismatch(
                    f"tensor {name!r} is to be quantized in two groups", remedy="name it once", tensor=name
                )
            groups[name] = number
            _check_quantizable(name, tensors.get(name), quantization.format)
    return groups


def _check_quantizable(name: str, tensor: TensorDeclaration | None, stage_format: StageFormat) -> None:
    if tensor is None:
        raise UnknownTensor(
            f"tensor {name!r} is to be quantized, and no rank declares it",
            remedy="make the list of what is quantized from the model that is trained",
            tensor=name,
        )
    if tensor.dtype not in QUANTIZED_FROM:
        raise WrongDtype(
            f"tensor {name!r} is to be quantized, and is declared with dtype {tensor.dtype!r}",
            remedy=f"stage it as one of {', '.join(sorted(QUANTIZED_FROM))}",
            tensor=name,
        )
    if len(tensor.shape) < MATRIX_DIMS:
        raise WrongShape(
            f"tensor {name!r} is to be quantized, and has shape {tensor.shape}",
            remedy="quantize matrices, and what is made of them",
            tensor=name,
        )
    if len(tensor.shape) > MATRIX_DIMS and stage_format is StageFormat.FP8_PER_TENSOR:
        raise WrongShape(
            f"tensor {name!r} of shape {tensor.shape} is to be quantized per tensor, and engines have a scale for each "
            "of its matrices",
            remedy="quantize per channel or per block, or stage each matrix as a tensor of its own",
            tensor=name,
        )


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _holders(declarations: Sequence[Sequence[TensorDeclaration]]) -> dict[str, dict[Box, list[int]]]:
    """Per tensor and distinct box, the ranks that hold it; checks each declaration by itself."""
    known: dict[str, tuple[int, TensorDeclaration]] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, tensors in enumerate(declarations):
        seen: set[str] = set()
        for tensor in tensors:
            if tensor.name in seen:
                raise BoxDoubled(
                    f"rank {rank} declares tensor {tensor.name!r} twice",
                    remedy="declare each tensor once, with all boxes that the rank holds",
                    tensor=tensor.name,
                    rank=rank,
                )
            seen.add(tensor.name)
            _check_declaration(rank, tensor)
            _check_agreement(rank, tensor, *known.setdefault(tensor.name, (rank, tensor)))
            for box in tensor.boxes:
                if rank in holders[tensor.name][box]:
                    raise _doubled(tensor.name, box, rank, rank)
                holders[tensor.name][box].append(rank)
            holders[tensor.name]  # a tensor declared without boxes is still to be covered
    return holders


def _check_declaration(rank: int, tensor: TensorDeclaration) -> None:
    if tensor.dtype not in ITEM_BYTES:
        raise WrongDtype(
            f"rank {rank} declares tensor {tensor.name!r} with dtype {tensor.dtype!r}",
            remedy=f"stage it as one of {', '.join(ITEM_BYTES)}",
            tensor=tensor.name,
            rank=rank,
        )
    if any(size < 1 for size in tensor.shape):
        raise WrongShape(
            f"rank {rank} declares tensor {tensor.name!r} with shape {tensor.shape}, which has no elements",
            remedy="leave empty tensors out of the declaration",
            tensor=tensor.name,
            rank=rank,
        )
    if math.prod(tensor.shape) > MAX_ELEMENTS:
        raise WrongShape(
            f"rank {rank} declares tensor {tensor.name!r} with shape {tensor.shape}: more than {MAX_ELEMENTS} elements",
            remedy="declare the tensor's true global shape",
            tensor=tensor.name,
            rank=rank,
        )
    for box in tensor.boxes:
        if not boxes.fits(box, tensor.shape) or not box.volume:
            raise BoxOutside(
                f"rank {rank} declares box {box} of tensor {tensor.name!r}, whose shape is {tensor.shape}",
                remedy="declare non-empty boxes inside the tensor's global shape",
                tensor=tensor.name,
                box=box,
                rank=rank,
            )


def _check_agreement(rank: int, tensor: TensorDeclaration, other_rank: int, other: TensorDeclaration) -> None:
    if tensor.dtype != other.dtype:
        raise WrongDtype(
            f"tensor {tensor.name!r} is {tensor.dtype} on rank {rank} and {other.dtype} on rank {other_rank}",
            remedy="declare the same dtype on every rank",
            tensor=tensor.name,
            rank=rank,
        )
    if tensor.shape != other.shape:
        raise WrongShape(
            f"tensor {tensor.name!r} has global shape {tensor.shape} on rank {rank}, "
            f"and {other.shape} on rank {other_rank}",
            remedy="declare the global shape, not the shard's, and the same on every rank",
            tensor=tensor.name,
            rank=rank,
        )


def _check_cover(tensor: TensorDeclaration, holders: Mapping[Box, Sequence[int]], covers: dict[_Cut, _Cover]) -> None:
    distinct = tuple(holders)
    if len(distinct) > MAX_BOXES:
        raise WrongShape(
            f"tensor {tensor.name!r} is declared in {len(distinct)} boxes, more than {MAX_BOXES}",
            remedy="declare it in fewer, larger boxes",
            tensor=tensor.name,
        )
    cut = tensor.shape, distinct
    if cut not in covers:
        covers[cut] = _cover(*cut)
    clash, missing = covers[cut]
    if clash is not None:
        raise _doubled(tensor.name, clash[2], holders[distinct[clash[0]]][0], holders[distinct[clash[1]]][0])
    if missing is not None:
        raise BoxMissing(
            f"no rank declared box {missing} of tensor {tensor.name!r}, whose shape is {tensor.shape}",
            remedy="declare every element of the tensor on some rank",
            tensor=tensor.name,
            box=missing,
        )


def _cover(shape: Shape, distinct: tuple[Box, ...]) -> _Cover:
    """Two boxes that share elements, and a box that is missing: None where there is no such thing."""
    clash = boxes.overlapping(distinct)
    if clash is None and sum(box.volume for box in distinct) == math.prod(shape):
        return None, None  # disjoint, and as large as the tensor: to cut it up box by box would tell the same
    return clash, None if clash else boxes.uncovered(shape, distinct)


def _doubled(name: str, box: Box, rank: int, other: int) -> BoxDoubled:
    who = f"rank {rank} twice" if rank == other else f"ranks {rank} and {other} in boxes that are not the same"
    return BoxDoubled(
        f"box {box} of tensor {name!r} is declared by {who}",
        remedy="declare each element once; replicas must declare identical boxes",
        tensor=name,
        box=box,
        rank=other,
    )


def _held(
    tensors: Mapping[str, TensorDeclaration], holders: Mapping[str, Mapping[Box, Sequence[int]]]
) -> Iterator[HeldBox]:
    for name, by_box in holders.items():
        item_bytes = ITEM_BYTES[tensors[name].dtype]
        for box, ranks in by_box.items():
            yield HeldBox(name, box, tuple(ranks), item_bytes)


def _place_cells(
    tensors: Sequence[StagedTensor], parts: Iterable[Part], grids: Sequence[Grid]
) -> tuple[tuple[OwnedBox, ...], int]:
    """Number the cells rank by rank, so that a rank writes its moments of a version in one piece per field."""
    position = {tensor.name: i for i, tensor in enumerate(tensors)}
    placed, at = [], 0
    for name, box, rank in sorted(parts, key=lambda part: (part.rank, position[part.tensor], part.box)):
        tensor = tensors[position[name]]
        placed.append(OwnedBox(tensor=position[name], box=box, rank=rank, first_cell=at))
        if tensor.has_moments:
            at += sum(moments.cells_of(grid, tensor.shape, box).volume for grid in grids)
    return tuple(placed), at
