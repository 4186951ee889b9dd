# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What quantization costs: how far live parameters, by one scale rule and by another, lie from what is staged.

A recipe is made of each parameter by itself, with scales of its own and no weight at all, and its moves are carried
into scratch memory, some rows at a time: nothing live is written, nor has to be read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Self

import torch

from stagingd.boxes import Box, cells
from stagingd.catalog import Catalog
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import OutOfOrder
from stagingd.health import LayerError
from stagingd.layers import Layers
from stagingd.moments import cell_shape
from stagingd_vllm.carriers import carrier
from stagingd_vllm.layouts import Home
from stagingd_vllm.leased import LeasedVersion
from stagingd_vllm.live_scales import LiveScales
from stagingd_vllm.moves import Move, Treatment
from stagingd_vllm.plan import PlanEntry, ReadPlan
from stagingd_vllm.quantize import dequantize, spread
from stagingd_vllm.recipe import make_recipe
from stagingd_vllm.scales import FP8_MAX, ScaleRule
from stagingd_vllm.schemes import INT8_MAX, Scheme

CHUNK: Final = 1 << 20
"""Values that are looked at together, or one row where that is more: they take 48 MiB on the weights' device."""
ROUNDING: Final = 1 / 256
"""How far, in proportion, a value may lie beyond what its scale represents and not be called clipped: engines round
scales too, to bfloat16 for INT8."""
GREATEST: Final = {"float8_e4m3fn": FP8_MAX, "int8": INT8_MAX}


@dataclass(frozen=True)
class QuantizationError:
    """The error of some values. What other ranks, or other parameters, found of others can be added, exactly.

    Values that are not finite are left out.

    Attributes:
        values: how many there are.
        clipped: how many lie beyond the greatest magnitude that their scale represents.
        flushed: how many are zero when they are dequantized, and were not.
        squared_error: the sum of (dequantized - staged)**2.
        squared_values: the sum of staged**2.
        greatest_error: the greatest magnitude of dequantized - staged.
    """

    values: int = 0
    clipped: int = 0
    flushed: int = 0
    squared_error: float = 0.0
    squared_values: float = 0.0
    greatest_error: float = 0.0

    def __add__(self, other: QuantizationError) -> QuantizationError:
        return QuantizationError(
            self.values + other.values,
            self.clipped + other.clipped,
            self.flushed + other.flushed,
            self.squared_error + other.squared_error,
            self.squared_values + other.squared_values,
            max(self.greatest_error, other.greatest_error),
        )

    @property
    def relative_rms_error(self) -> float:
        """The norm of the error in proportion to that of the values; 0 where all of them are 0."""
        return (self.squared_error / self.squared_values) ** 0.5 if self.squared_values else 0.0

    def figures(self) -> dict[str, float]:
        """All of it by name: what adds up, and what follows from that."""
        count = max(self.values, 1)
        shares = {"clipped_share": self.clipped / count, "flushed_share": self.flushed / count}
        return asdict(self) | {"relative_rms_error": self.relative_rms_error} | shares

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self:
        """From ``figures``."""
        return cls(**{field.name: figures[field.name] for field in fields(cls)})


Errors = dict[str, QuantizationError]
"""By scale rule."""


def quantization_errors(
    plan: ReadPlan, homes: Mapping[str, Home], catalog: Catalog, version: LeasedVersion, rules: Mapping[str, ScaleRule]
) -> dict[str, Errors]:
    """What every rule makes of every quantized parameter of a worker, by its name: see ``tensor_errors``."""
    found = tensor_errors(plan, homes, catalog, version, rules)
    return {name: summed(errors.values()) for name, errors in found.items()}


def tensor_errors(
    plan: ReadPlan, homes: Mapping[str, Home], catalog: Catalog, version: LeasedVersion, rules: Mapping[str, ScaleRule]
) -> dict[str, dict[str, Errors]]:
    """What every rule makes of every staged tensor of every quantized parameter of a worker, by both names.

    Args:
        plan: what the worker reads.
        homes: where its parameters live: told of are those with a scheme.
        catalog: the stage's.
        version: leased; its slot has to be readable by the weights' device.
        rules: by name.

    Raises:
        PlanRefused, OutOfOrder: as ``make_recipe`` says.
        OutOfOrder: trainers have quantized tensors of the stage: what they were before is not known.
        LeaseLost: the lease ended meanwhile.
    """
    if catalog.format is not None:
        raise OutOfOrder(
            f"the stage is in {catalog.format}: it does not hold the values that were quantized",
            remedy="open the stage without quantization on the trainers, and ask an engine that is attached to it",
        )
    entries: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        if homes[entry.region.parameter].scheme is not None:
            entries.setdefault(entry.region.parameter, []).append(entry)
    return {
        name: _of_parameter(replace(plan, entries=tuple(own)), name, homes[name], catalog, version, rules)
        for name, own in entries.items()
    }


def summed(errors: Iterable[Errors]) -> Errors:
    """Those of several parameters, or of several ranks."""
    total: Errors = {}
    for one in errors:
        total = {rule: total.get(rule, QuantizationError()) + error for rule, error in one.items()}
    return total


def layer_errors(layers: Layers, errors: Iterable[tuple[str, QuantizationError]]) -> tuple[LayerError, ...]:
    """What tensors, each with its name, add up to in the layers of a stage, as the daemon is told."""
    total: dict[int, QuantizationError] = {}
    for tensor, error in errors:
        layer = layers.of[tensor]
        total[layer] = total.get(layer, QuantizationError()) + error
    return tuple(
        LayerError(
            layer=layers.names[layer],
            values=error.values,
            clipped=error.clipped,
            flushed=error.flushed,
            squared_error=error.squared_error,
            squared_values=error.squared_values,
        )
        for layer, error in total.items()
    )


def _of_parameter(
    plan: ReadPlan, name: str, home: Home, catalog: Catalog, version: LeasedVersion, rules: Mapping[str, ScaleRule]
) -> dict[str, Errors]:
    assert home.scheme is not None
    assert home.scale is not None
    shadows, recipes, kept = [], [], []
    for rule in rules.values():
        # A weight without memory: whatever went wrong, nothing could be written to it.
        shadow = torch.zeros_like(home.scale)
        recipe = make_recipe(plan, {name: replace(home, weight=home.weight.to("meta"), scale=shadow)}, catalog, rule)
        setter = LiveScales(recipe, shadow.device)
        setter.set(version.slot, version.stored)
        shadows.append(shadow)
        recipes.append(recipe)
        kept.append(setter)  # until its copies are done, which the sums wait for
    by_tensor: dict[str, torch.Tensor] = {}
    offsets = [tensor.offset for tensor in catalog.tensors]
    for moves in zip(*(recipe.moves for recipe in recipes), strict=True):
        tensor = catalog.tensors[bisect_right(offsets, moves[0].source) - 1].name
        nothing = torch.zeros(len(shadows), len(fields(QuantizationError)), dtype=torch.float64)
        sums = by_tensor.setdefault(tensor, nothing.to(shadows[0].device))
        for some in zip(*map(_chunks, moves), strict=True):
            found = _chunk(some, shadows, home.scheme, version.slot)
            greatest = torch.maximum(sums[:, -1], found[:, -1])
            sums += found
            sums[:, -1] = greatest
    return {
        tensor: {rule: _error(row) for rule, row in zip(rules, sums.tolist(), strict=True)}
        for tensor, sums in by_tensor.items()
    }


def _error(sums: Sequence[float]) -> QuantizationError:
    values, clipped, flushed, *rest = sums
    return QuantizationError(int(values), int(clipped), int(flushed), *rest)


def _chunks(move: Move) -> Iterator[Move]:
    """A move cut into rows, of CHUNK elements at most where a row has no more."""
    assert move.scales is not None
    step = max(1, CHUNK // move.columns)
    for first in range(0, move.rows, step):
        yield replace(
            move,
            source=move.source + first * move.source_row * ITEM_BYTES[move.staged],
            rows=min(step, move.rows - first),
            scales=replace(move.scales, first_row=move.scales.first_row + first),
        )


def _chunk(moves: Sequence[Move], grids: Sequence[torch.Tensor], scheme: Scheme, slot: torch.Tensor) -> torch.Tensor:
    """The sums of some rows, for each grid of scales: float64, in the order of the fields of QuantizationError."""
    device, first = grids[0].device, moves[0]
    size = (first.rows, first.columns)
    staged = torch.empty(size, dtype=getattr(torch, first.staged), device=device)
    made = [torch.empty(size, dtype=getattr(torch, scheme.live), device=device) for _ in moves]
    copy = replace(_into(staged, first), live=first.staged, treatment=Treatment.COPY, scales=None)
    carrier([copy, *map(_into, made, moves)], device).carry(slot)
    return torch.stack([_sums(staged, *one, scheme) for one in zip(made, moves, grids, strict=True)])


def _into(target: torch.Tensor, move: Move) -> Move:
    return replace(move, target=target.data_ptr(), target_row=move.columns, target_column=1)


def _sums(
    staged: torch.Tensor, quantized: torch.Tensor, move: Move, grid: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    box, scale = _touched(move, grid, scheme)
    finite = staged.isfinite()
    exact = staged.double().masked_fill_(~finite, 0.0)
    back = dequantize(quantized, scale, scheme.granularity, box).masked_fill_(~finite, 0.0)
    limit = spread(scale, scheme.granularity, box) * (GREATEST[scheme.live] * (1 + ROUNDING))
    counts = [finite.sum(), (exact.abs() > limit).sum(), ((back == 0) & (exact != 0)).sum()]
    error = back.sub_(exact)
    greatest = error.abs().max()
    return torch.stack([*(count.double() for count in counts), error.square_().sum(), exact.square_().sum(), greatest])


def _touched(move: Move, grid: torch.Tensor, scheme: Scheme) -> tuple[Box, torch.Tensor]:
    """Where a move's elements lie in the grid's coordinates, and the scales of the cells there, as float64."""
    assert move.scales is not None
    box = Box((move.scales.first_row, move.scales.first_column), (move.rows, move.columns))
    some = cells(box, cell_shape(scheme.granularity.grid, box.ends))
    leading = (move.scales.address - grid.data_ptr()) // grid.element_size()
    stride = (move.scales.row_stride, 1)
    offset = leading + sum(i * step for i, step in zip(some.offsets, stride, strict=True))
    return box, grid.as_strided(some.lengths, stride, offset).double()
