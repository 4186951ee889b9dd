# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What trainers may quantize for an engine: from its plans, which tensors, and which of them share a scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from stagingd.boxes import Shape
from stagingd.formats import QUANTIZED_FROM, EngineDevice, Quantization, StageFormat
from stagingd_vllm.matrices import Matrix, matrices
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor
from stagingd_vllm.prequantized import FORMATS, misfit
from stagingd_vllm.scales import Granularity
from stagingd_vllm.schemes import Scheme


def stage_quantization(
    plans: Sequence[ReadPlan],
    schemes: Mapping[str, Scheme],
    staged: Mapping[str, StagedTensor],
    device: EngineDevice = "cuda",
) -> Quantization:
    """What trainers can quantize so that an engine's workers copy it: every tensor whose bytes fit where they go.

    Left out, to be staged as they are and quantized by the workers, are tensors of which an engine makes several
    scales where the format has one, those that it cuts elsewhere than at blocks, those that go to a parameter that
    is not quantized as well, and those that its own loader computes with; with one, all that share a scale with it.

    Args:
        plans: of all ranks of the engine, or that of one rank that holds all of the model: then cuts of blocks by
            tensor parallelism are not looked at. Their ``shapes`` have to tell those of quantized parameters.
        schemes: of each parameter that is quantized, how; pipeline stages have different parameters.
        staged: every tensor of the stage by its name.
        device: on which kind of device the engine's weights are.

    Raises:
        PlanRefused: the engine quantizes nothing that fits, or in a way, or in several, that no format has.
    """
    held = _format(schemes)
    granularity = next(iter(schemes.values())).granularity
    fused: dict[tuple[str, ...], None] = {}
    left_out = {name for name, tensor in staged.items() if tensor.dtype not in QUANTIZED_FROM}
    for plan in plans:
        left_out |= {computed.tensor for computed in plan.computed}
        left_out |= {entry.tensor for entry in plan.entries if entry.region.parameter not in schemes}
        left_out |= _misfits(plan, schemes, staged, granularity)
        fused |= dict.fromkeys(_fused(plan, schemes, staged, granularity))
    groups = tuple(_fitting(list(fused), left_out))
    if not groups:
        raise PlanRefused(
            f"nothing that this engine makes {held} fits in a stage of that format",
            remedy="stage it as it is: its workers quantize it",
        )
    return Quantization(format=held, device=device, groups=groups)


def _format(schemes: Mapping[str, Scheme]) -> StageFormat:
    """The one format of all schemes."""
    first: dict[StageFormat, str] = {}
    for parameter, scheme in schemes.items():
        held = FORMATS.get(scheme)
        if held is None:
            raise PlanRefused(
                f"{parameter} is {scheme.name}, and no stage is in that format",
                remedy=f"stage it as it is, or serve the model in one of {', '.join(FORMATS.values())}",
                parameter=parameter,
            )
        first.setdefault(held, parameter)
    if len(first) != 1:
        found = ", ".join(f"{parameter} is {held}" for held, parameter in first.items())
        raise PlanRefused(
            f"a stage has one format, and of this engine {found or 'no parameter is quantized'}",
            remedy="stage it as it is, or serve the model in one format",
        )
    return next(iter(first))


def _matrices(
    plan: ReadPlan, schemes: Mapping[str, Scheme], staged: Mapping[str, StagedTensor]
) -> Iterator[tuple[Matrix, Shape]]:
    """All that goes to quantized parameters, with the shape of its tensor."""
    for entry in plan.entries:
        if entry.region.parameter in schemes:
            shape = staged[entry.tensor].shape
            for matrix in matrices(entry, shape, plan.shapes[entry.region.parameter]):
                yield matrix, shape


def _misfits(
    plan: ReadPlan, schemes: Mapping[str, Scheme], staged: Mapping[str, StagedTensor], granularity: Granularity
) -> set[str]:
    """Tensors whose scales are not the stage's; of blocks, all of a parameter where one does not fall on them."""
    unfit = [matrix.entry for matrix, shape in _matrices(plan, schemes, staged) if misfit(matrix, granularity, shape)]
    if granularity is not Granularity.BLOCK:
        return {entry.tensor for entry in unfit}
    beside = {entry.region.parameter for entry in unfit}
    return {entry.tensor for entry in plan.entries if entry.region.parameter in beside}


def _fused(
    plan: ReadPlan, schemes: Mapping[str, Scheme], staged: Mapping[str, StagedTensor], granularity: Granularity
) -> Iterator[tuple[str, ...]]:
    """Tensors that share a scale of a whole tensor: those of one parameter and leading index. Else each by itself."""
    places: dict[tuple[str, Shape], dict[str, None]] = {}
    for matrix, _ in _matrices(plan, schemes, staged):
        name, parameter = matrix.entry.tensor, matrix.entry.region.parameter
        if granularity is Granularity.TENSOR:
            places.setdefault((parameter, matrix.leading), {})[name] = None
        else:
            yield (name,)
    yield from (tuple(names) for names in places.values())


def _fitting(fused: Sequence[tuple[str, ...]], left_out: set[str]) -> Iterable[tuple[str, ...]]:
    """The groups of which no tensor is left out, nor belongs to two."""
    homes: dict[str, tuple[str, ...]] = {}
    out = set(left_out)
    for group in fused:
        for name in group:
            if set(homes.setdefault(name, group)) != set(group):
                out.add(name)
    while spread := {name for group in fused if not out.isdisjoint(group) for name in group} - out:
        out |= spread
    return {frozenset(group): group for group in fused if out.isdisjoint(group)}.values()
