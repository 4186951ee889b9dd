# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The read plan: which box of which staged tensor goes to which region of which live parameter of one worker.

Nothing here imports torch or vLLM: a plan is made from what a trace of the model's own loader recorded
(``tracing.py``), and what the record does not explain is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stagingd.boxes import Box, Shape, intersect, overlapping, uncovered
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import StagingError
from stagingd_vllm.views import View, align, box_of


class PlanRefused(StagingError):
    """The model's loader does something that a read plan cannot repeat."""

    code = "plan_refused"


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """A tensor of the stage: its dtype by name ("bfloat16") and its global shape."""

    dtype: str
    shape: Shape

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Region:
    """Where elements go: a strided view of one live parameter.

    ``offset``, ``shape`` and ``stride`` are in elements, counted from the parameter's first element.
    """

    parameter: str
    offset: int
    shape: Shape
    stride: Shape


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One read: a box of a staged tensor (of ``dtype``), and the region of the same shape that takes it."""

    tensor: str
    dtype: str
    source: Box
    region: Region

    @property
    def bytes(self) -> int:
        """Bytes read from the stage."""
        return self.source.volume * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Write:
    """What a loader did to one parameter: a copy from a staged tensor, or a constant when ``tensor`` is None."""

    parameter: str
    target: View
    tensor: str | None = None
    source: View = field(default=View(0, (), ()))


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All reads of one worker, in the order in which the loader made them.

    ``unread`` names the staged tensors of which this worker reads nothing: those whose parameter is tied to
    another one, and those that lie on other ranks altogether.
    """

    entries: tuple[PlanEntry, ...]
    staged_bytes: int
    unread: tuple[str, ...] = ()

    @property
    def bytes_per_update(self) -> int:
        """Bytes that this worker reads of each version."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The staged tensors that are read, each once."""
        return tuple(dict.fromkeys(entry.tensor for entry in self.entries))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The live parameters that are written, each once."""
        return tuple(dict.fromkeys(entry.region.parameter for entry in self.entries))

    def __str__(self) -> str:
        read, staged = self.bytes_per_update, self.staged_bytes
        share = f" ({read / staged:.0%})" if staged else ""
        return (
            f"{len(self.entries)} reads of {len(self.tensors)} tensors into {len(self.parameters)} parameters: "
            f"{read:,} of {staged:,} bytes{share} per version"
        )


def make_plan(
    writes: Iterable[Write],
    staged: Mapping[str, StagedTensor],
    parameters: Mapping[str, Shape],
    aliases: Mapping[str, str],
) -> ReadPlan:
    """Turns what a loader did into a plan, and refuses what is incomplete or ambiguous.

    Args:
        writes: every write to a parameter, in order, under the parameter's name in ``parameters``.
        staged: every tensor of the stage.
        parameters: shape of every contiguous parameter that has to be filled.
        aliases: further names of parameters that share another one's memory -> that one's name.

    Raises:
        PlanRefused: a view is not a box; a region is written by two reads, or overwritten by a constant; a
            parameter is not filled; a staged tensor goes nowhere. Names the tensor or parameter.
    """
    history = tuple(writes)
    copies = {name: list[PlanEntry]() for name in parameters}
    constants = {name: list[Box]() for name in parameters}
    for write in history:
        if not write.target.volume:
            continue
        if write.tensor is None:
            constants[write.parameter].append(_constant(write, parameters, copies[write.parameter]))
        else:
            copies[write.parameter].append(_entry(write, staged[write.tensor]))
    for name, shape in parameters.items():
        _check_filled(name, shape, tuple(dict.fromkeys(copies[name])), constants[name])
    taken = {write.tensor for write in history}
    _check_taken([name for name in staged if name not in taken], aliases)
    entries = tuple(dict.fromkeys(entry for name in parameters for entry in copies[name]))
    read = {entry.tensor for entry in entries}
    unread = tuple(name for name in staged if name not in read)
    return ReadPlan(entries, sum(tensor.bytes for tensor in staged.values()), unread)


def plan_with_aliases(derive: Callable[[Mapping[str, str]], ReadPlan], aliases: Mapping[str, str]) -> ReadPlan:
    """The plan without the stage's aliases, or with them where the model cannot be filled otherwise.

    A model whose weights are tied needs no alias, and its loader may refuse a name that its checkpoints never
    have; one whose weights are apart needs the tensor under both names.

    Args:
        derive: makes the plan with the aliases that it is given.
        aliases: further names of staged tensors, each with the tensor's own.

    Raises:
        PlanRefused: neither can be done; what is told is what is wrong with the model rather than with an alias.
    """
    try:
        return derive({})
    except PlanRefused as refused:
        if not aliases:
            raise
        try:
            return derive(aliases)
        except PlanRefused as also:
            raise (refused if also.context.get("tensor") in aliases else also) from None


def _entry(write: Write, tensor: StagedTensor) -> PlanEntry:
    name = write.tensor or ""
    aligned = align(write.source, write.target, tensor.shape)
    if aligned is None:
        raise PlanRefused(
            f"what the loader copies from {name} {tensor.shape} to {write.parameter} is not a box: {write.source}",
            remedy="only slices, transpositions and reshapes of whole boxes can be read in place",
            tensor=name,
            parameter=write.parameter,
        )
    box, region = aligned
    return PlanEntry(name, tensor.dtype, box, Region(write.parameter, region.offset, region.shape, region.stride))


def _target_box(parameter: str, target: View, shape: Shape) -> Box:
    box = box_of(target, shape)
    if box is None:
        raise PlanRefused(
            f"what the loader writes in {parameter} {shape} is not a box of it: {target}",
            remedy="whether such a parameter is filled cannot be checked; load this model with vLLM's own loader",
            parameter=parameter,
        )
    return box


def _constant(write: Write, parameters: Mapping[str, Shape], earlier: Sequence[PlanEntry]) -> Box:
    box = _target_box(write.parameter, write.target, parameters[write.parameter])
    for entry in earlier:
        if intersect(box, _entry_box(entry, parameters[write.parameter])):
            raise PlanRefused(
                f"the loader fills {box} of {write.parameter} with a constant after copying {entry.tensor} there",
                remedy="a read in place would bring back what the loader removed; use vLLM's own loader",
                parameter=write.parameter,
                tensor=entry.tensor,
                box=box,
            )
    return box


def _entry_box(entry: PlanEntry, shape: Shape) -> Box:
    region = entry.region
    return _target_box(region.parameter, View(region.offset, region.shape, region.stride), shape)


def _check_filled(name: str, shape: Shape, entries: Sequence[PlanEntry], constants: Sequence[Box]) -> None:
    boxes = [_entry_box(entry, shape) for entry in entries]
    double = overlapping(boxes)
    if double is not None:
        first, second = entries[double[0]].tensor, entries[double[1]].tensor
        raise PlanRefused(
            f"{double[2]} of parameter {name} is written from {first} and from {second}",
            remedy="stage only one of the two",
            parameter=name,
            tensor=second,
            box=double[2],
        )
    missing = uncovered(shape, [*boxes, *constants])
    if missing is not None:
        raise PlanRefused(
            f"no staged tensor fills {missing} of parameter {name} {shape}",
            remedy="stage every tensor of the checkpoint",
            parameter=name,
            box=missing,
        )


def _check_taken(untaken: Sequence[str], aliases: Mapping[str, str]) -> None:
    """A loader skips the second name of a tied parameter, rightly; whatever else it skips would be lost."""
    for name in untaken:
        if not any(alias == name or alias.endswith(f".{name}") for alias in aliases):
            raise PlanRefused(
                f"no parameter of this model takes staged tensor {name}",
                remedy="leave it out of the stage, or check that the stage holds this model",
                tensor=name,
            )
