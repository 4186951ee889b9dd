# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The read plan: which box of which staged tensor goes to which region of which live parameter of one worker.

Nothing here imports torch or vLLM: a plan is made from what a trace of the model's own loader recorded
(``tracing.py``). What the loader computes is set apart, and what the record does not explain is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stagingd.boxes import Box, Shape, intersect, overlapping, uncovered
from stagingd.catalog import Catalog
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import StagingError
from stagingd_vllm.views import View, align, box_of, join_adjacent


class PlanRefused(StagingError):
    """The model's loader does something that a read plan cannot repeat."""

    code = "plan_refused"


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """A tensor of the stage: the dtype of its values by name ("bfloat16") and its global shape.

    ``held`` is the dtype in which the stage holds it where that is another one: trainers have quantized it.
    """

    dtype: str
    shape: Shape
    held: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor, as it is held."""
        return math.prod(self.shape) * ITEM_BYTES[self.held or self.dtype]


def staged_tensors(catalog: Catalog) -> dict[str, StagedTensor]:
    """All tensors of a stage by name, in its order, as plans know them: by the dtype of their values."""
    return {
        tensor.name: StagedTensor(tensor.value_dtype, tensor.shape, tensor.dtype if tensor.quantized_from else None)
        for tensor in catalog.tensors
    }


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
    """One read: a box of a staged tensor (of ``dtype``), and the region of the same shape that takes it.

    ``cast`` is the parameter's dtype where it is another one: each element is converted as it is written.
    ``held`` is the dtype in which the stage holds the tensor where trainers have quantized it.
    """

    tensor: str
    dtype: str
    source: Box
    region: Region
    cast: str | None = None
    held: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes read from the stage."""
        return self.source.volume * ITEM_BYTES[self.held or self.dtype]

    def rows(self, first: int, count: int) -> PlanEntry:
        """The read of some indices of the first dim, which there has to be."""
        region, (start, *others) = self.region, self.source.offsets
        return dataclasses.replace(
            self,
            source=Box((start + first, *others), (count, *self.source.lengths[1:])),
            region=dataclasses.replace(
                region, offset=region.offset + first * region.stride[0], shape=(count, *region.shape[1:])
            ),
        )


@dataclass(frozen=True, slots=True)
class Computed:
    """A staged tensor (of so many bytes) that only the model's own loader can take, and why.

    ``parameters`` are all that it ends in. The computed tensors of a plan together fill all of their parameters,
    when they are given to ``load_weights`` whole, in this order and under their aliases too.
    """

    tensor: str
    bytes: int
    parameters: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Write:
    """What a loader did to one parameter: a copy from a staged tensor, or a constant when ``tensor`` is None.

    ``cast`` is the parameter's dtype where the staged tensor has another. ``computed`` tells what the loader did
    that is more than a copy; ``source`` then has no meaning. A write without elements tells that the loader knows
    the tensor, and that it has nothing for this rank.
    """

    parameter: str
    target: View
    tensor: str | None = None
    source: View = field(default=View(0, (), ()))
    cast: str | None = None
    computed: str | None = None


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All reads of one worker, in the order in which they lie in the stage.

    ``unread`` names the staged tensors of which this worker reads nothing: those whose parameter is tied to
    another one, and those that lie on other ranks altogether. ``computed`` are those that are not read in boxes but
    have to go through the model's own loader. ``shapes`` are those of the parameters, as the loader sees them.
    ``aliases`` are the further names under which the loader was given staged tensors, each with the tensor's own.
    """

    entries: tuple[PlanEntry, ...]
    staged_bytes: int
    unread: tuple[str, ...] = ()
    computed: tuple[Computed, ...] = ()
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_per_update(self) -> int:
        """Bytes that this worker reads of each version."""
        return sum(entry.bytes for entry in self.entries) + sum(tensor.bytes for tensor in self.computed)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The staged tensors that are read in boxes, each once."""
        return tuple(dict.fromkeys(entry.tensor for entry in self.entries))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The live parameters that are written by entries, each once."""
        return tuple(dict.fromkeys(entry.region.parameter for entry in self.entries))

    @property
    def computed_parameters(self) -> tuple[str, ...]:
        """The live parameters that the model's own loader fills, each once."""
        return tuple(dict.fromkeys(name for tensor in self.computed for name in tensor.parameters))

    def __str__(self) -> str:
        read, staged = self.bytes_per_update, self.staged_bytes
        share = f" ({read / staged:.0%})" if staged else ""
        computed = f", and {len(self.computed)} tensors by the model's own loader" if self.computed else ""
        return (
            f"{len(self.entries)} reads of {len(self.tensors)} tensors into {len(self.parameters)} parameters"
            f"{computed}: {read:,} of {staged:,} bytes{share} per version"
        )


def make_plan(
    writes: Iterable[Write],
    staged: Mapping[str, StagedTensor],
    parameters: Mapping[str, Shape],
    aliases: Mapping[str, str],
    elsewhere: Collection[str] = (),
    *,
    allow_computed: bool = False,
) -> ReadPlan:
    """Turns what a loader did into a plan, and refuses what is incomplete or ambiguous.

    Args:
        writes: every write to a parameter, in order, under the parameter's name in ``parameters``.
        staged: every tensor of the stage, in the order in which they lie in it.
        parameters: shape of every contiguous parameter that has to be filled.
        aliases: further names of parameters that share another one's memory -> that one's name.
        elsewhere: staged tensors of which it is known that they belong to other ranks alone.
        allow_computed: whether the caller can take tensors through the model's own loader.

    Raises:
        PlanRefused: a loader computes, unless that is allowed; a region is written by two reads; a parameter is
            not filled; a staged tensor goes nowhere. Names the tensor or parameter.
    """
    history = tuple(writes)
    taken = {write.tensor for write in history}
    _check_taken([name for name in staged if name not in taken and name not in elsewhere], aliases)
    steps: dict[str, list[_Step]] = {name: [] for name in parameters}
    for write in history:
        if write.target.volume:
            steps[write.parameter].append(_step(write, staged, parameters[write.parameter]))
    reasons = _reasons(steps)
    if reasons and not allow_computed:
        raise _computes(*next(iter(reasons.items())))
    apart = _computed_parameters(steps, reasons)
    for name, shape in parameters.items():
        _check_filled(name, shape, steps[name], may_overlap=name in apart)
    entries = [entry for name in parameters if name not in apart for entry in _joined(steps[name])]
    order = {name: index for index, name in enumerate(staged)}
    entries.sort(key=lambda entry: (order[entry.tensor], entry.source.offsets))
    computed = _computed(staged, steps, reasons, apart)
    read = {entry.tensor for entry in entries} | {tensor.tensor for tensor in computed}
    unread = tuple(name for name in staged if name not in read)
    staged_bytes = sum(tensor.bytes for tensor in staged.values())
    return ReadPlan(tuple(entries), staged_bytes, unread, computed, dict(parameters))


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


@dataclass(frozen=True, slots=True)
class _Step:
    """A write that moves elements: where to, and the read that repeats it, if one does, or why none does."""

    write: Write
    box: Box
    entry: PlanEntry | None
    reason: str | None


def _step(write: Write, staged: Mapping[str, StagedTensor], shape: Shape) -> _Step:
    box = _target_box(write.parameter, write.target, shape)
    if write.tensor is None or write.computed is not None:
        return _Step(write, box, None, write.computed)
    tensor = staged[write.tensor]
    aligned = align(write.source, write.target, tensor.shape)
    if aligned is None:
        what = f"what the loader copies from {write.tensor} {tensor.shape} to {write.parameter} is not a box"
        return _Step(write, box, None, f"{what}: {write.source}")
    source, target = aligned
    region = Region(write.parameter, target.offset, target.shape, target.stride)
    return _Step(write, box, PlanEntry(write.tensor, tensor.dtype, source, region, write.cast, tensor.held), None)


def _target_box(parameter: str, target: View, shape: Shape) -> Box:
    box = box_of(target, shape)
    if box is None:
        raise PlanRefused(
            f"what the loader writes in {parameter} {shape} is not a box of it: {target}",
            remedy="whether such a parameter is filled cannot be checked; load this model with vLLM's own loader",
            parameter=parameter,
        )
    return box


def _reasons(steps: Mapping[str, Sequence[_Step]]) -> dict[str, str]:
    """Why tensors cannot be read in boxes, for those that cannot."""
    reasons: dict[str, str] = {}
    for name, history in steps.items():
        for i, step in enumerate(history):
            if step.write.tensor is not None and step.reason is not None:
                reasons.setdefault(step.write.tensor, step.reason)
            if step.write.tensor is not None:
                continue
            for earlier in history[:i]:
                if earlier.write.tensor is not None and intersect(step.box, earlier.box):
                    what = f"the loader fills {step.box} of {name} with a constant after copying"
                    reasons.setdefault(earlier.write.tensor, f"{what} {earlier.write.tensor} there")
    return reasons


def _computes(tensor: str, reason: str) -> PlanRefused:
    return PlanRefused(
        reason,
        remedy="such a tensor cannot be read in place; only the model's own loader can take it",
        tensor=tensor,
    )


def _computed_parameters(steps: Mapping[str, Sequence[_Step]], reasons: Mapping[str, str]) -> set[str]:
    """The parameters that the tensors with a reason end in, and all that hang together with these.

    A parameter is filled wholly by one way. So whatever else goes into it goes the same way, and with it the other
    parameters that this goes into.
    """
    writers = {name: {s.write.tensor for s in history if s.write.tensor} for name, history in steps.items()}
    written: defaultdict[str, set[str]] = defaultdict(set)
    for name, tensors in writers.items():
        for tensor in tensors:
            written[tensor].add(name)
    found: set[str] = set()
    todo = [name for tensor in reasons for name in written[tensor]]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [other for tensor in writers[name] for other in written[tensor]]
    return found


def _computed(
    staged: Mapping[str, StagedTensor],
    steps: Mapping[str, Sequence[_Step]],
    reasons: Mapping[str, str],
    apart: Collection[str],
) -> tuple[Computed, ...]:
    """The tensors that end in these parameters, in the order of the stage."""
    ends: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for name in steps:
        if name in apart:
            for step in steps[name]:
                if step.write.tensor is not None:
                    ends[step.write.tensor][name] = None
    return tuple(
        Computed(name, tensor.bytes, tuple(ends[name]), reasons.get(name) or f"it shares {next(iter(ends[name]))}")
        for name, tensor in staged.items()
        if name in ends
    )


def _check_filled(name: str, shape: Shape, steps: Sequence[_Step], *, may_overlap: bool) -> None:
    reads = list({step.entry: step for step in steps if step.entry is not None}.values())
    double = None if may_overlap else overlapping([step.box for step in reads])
    if double is not None:
        first, second = reads[double[0]].write.tensor, reads[double[1]].write.tensor
        raise PlanRefused(
            f"{double[2]} of parameter {name} is written from {first} and from {second}",
            remedy="stage only one of the two",
            parameter=name,
            tensor=second,
            box=double[2],
        )
    if not may_overlap and sum(step.box.volume for step in reads) == math.prod(shape):
        return
    missing = uncovered(shape, sorted(step.box for step in steps))
    if missing is not None:
        raise PlanRefused(
            f"no staged tensor fills {missing} of parameter {name} {shape}",
            remedy="stage every tensor of the checkpoint",
            parameter=name,
            box=missing,
        )


def _joined(steps: Iterable[_Step]) -> list[PlanEntry]:
    """The reads of one parameter, each once; those that continue each other are made one."""
    alike: defaultdict[tuple[object, ...], list[PlanEntry]] = defaultdict(list)
    for entry in dict.fromkeys(step.entry for step in steps if step.entry is not None):
        alike[entry.tensor, entry.region.parameter].append(entry)
    joined: list[PlanEntry] = []
    for entries in alike.values():
        parts = [(e.source, View(e.region.offset, e.region.shape, e.region.stride)) for e in entries]
        for box, view in join_adjacent(parts):
            region = Region(entries[0].region.parameter, view.offset, view.shape, view.stride)
            joined.append(dataclasses.replace(entries[0], source=box, region=region))
    return joined


def _check_taken(untaken: Sequence[str], aliases: Mapping[str, str]) -> None:
    """A loader skips the second name of a tied parameter, rightly; whatever else it skips would be lost."""
    for name in untaken:
        if not any(alias == name or alias.endswith(f".{name}") for alias in aliases):
            raise PlanRefused(
                f"no parameter of this model takes staged tensor {name}",
                remedy="leave it out of the stage, or check that the stage holds this model",
                tensor=name,
            )
