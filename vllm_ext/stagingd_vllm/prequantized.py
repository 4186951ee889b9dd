# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors that trainers have quantized: which live weights their bytes can be copied into, and why not into others.

Bytes and scale belong together. Trainers make the bytes with the scales of the stage's format; a worker makes its
scales from the same moments. So bytes fit where the worker's scales are made of the same cells, by the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from stagingd.boxes import Shape, whole
from stagingd.catalog import Catalog, StagedTensor
from stagingd.formats import StageFormat
from stagingd_vllm.layouts import Home
from stagingd_vllm.limits import falls_on_blocks
from stagingd_vllm.matrices import Matrix
from stagingd_vllm.plan import PlanRefused
from stagingd_vllm.scales import Granularity, ScaleRule
from stagingd_vllm.schemes import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, INT8_PER_CHANNEL, Scheme

FORMATS: Final[Mapping[Scheme, StageFormat]] = {
    FP8_PER_TENSOR: StageFormat.FP8_PER_TENSOR,
    FP8_PER_CHANNEL: StageFormat.FP8_PER_CHANNEL,
    FP8_PER_BLOCK: StageFormat.FP8_PER_BLOCK,
    INT8_PER_CHANNEL: StageFormat.INT8_PER_CHANNEL,
}
"""The format whose bytes and scales are those of a scheme. TorchAO's have another arithmetic, and none."""


def misfit(matrix: Matrix, granularity: Granularity, shape: Shape) -> str | None:
    """Why a matrix's scales are not those of the whole tensor, cell by cell; None where they are.

    Args:
        matrix: part of a parameter, and of a tensor of this shape.
        granularity: what shares a scale.
        shape: the tensor's.
    """
    if granularity is Granularity.TENSOR:
        return None if matrix.group == whole(shape) else "the engine has several scales for it, one per leading index"
    if granularity is Granularity.CHANNEL:
        return None if matrix.columns_of == len(shape) - 1 else "its rows are columns there"
    return None if falls_on_blocks(matrix, shape) else "the engine cuts it elsewhere than at blocks of 128"


def refuse_unfit(cut: Sequence[tuple[Matrix, Home]], catalog: Catalog, rule: ScaleRule) -> None:
    """Refuses what is quantized already and does not fit where it goes.

    Args:
        cut: all matrices of some parameters, each with its parameter's home.
        catalog: the stage's.
        rule: how the worker's scales follow from moments.

    Raises:
        PlanRefused: names tensor and parameter, and says what would fit.
    """
    if catalog.format is None:
        return
    fused = _fused(cut, catalog)
    off_blocks = _off_blocks(cut, catalog)
    for matrix, home in cut:
        tensor = catalog.tensor(matrix.entry.tensor)
        if tensor.quantized_from is None:
            continue
        parameter = matrix.entry.region.parameter
        scheme = _fitting_scheme(tensor, parameter, home, catalog.format, rule)
        _check_device(tensor, parameter, home, catalog)
        why = misfit(matrix, scheme.granularity, tensor.shape)
        if why is not None:
            raise _refused(tensor, parameter, catalog.format, why)
        if scheme.granularity is Granularity.TENSOR:
            _check_group(tensor, parameter, fused[parameter, matrix.leading], catalog)
        if scheme.granularity is Granularity.BLOCK and parameter in off_blocks:
            other = f"the engine cuts {off_blocks[parameter]}, beside it, elsewhere than at blocks of 128"
            raise _refused(tensor, parameter, catalog.format, other)


def _fitting_scheme(tensor: StagedTensor, parameter: str, home: Home, held: StageFormat, rule: ScaleRule) -> Scheme:
    """The home's scheme, if its bytes are those of the stage's format."""
    scheme = home.scheme
    if scheme is None:
        raise _refused(tensor, parameter, held, "this parameter is not quantized")
    if rule.sigmas is not None:
        why = f"its bytes are made by amax, and the scale rule is sigma:{rule.sigmas:g}"
        raise _refused(tensor, parameter, held, why, 'attach with scale_rule "amax"')
    wanted = FORMATS.get(scheme)
    if wanted is None:
        raise _refused(tensor, parameter, held, f"this parameter is {scheme.name}, whose arithmetic no format has")
    if wanted is not held:
        raise _refused(tensor, parameter, held, f"this parameter is {scheme.name}", f"open the stage in {wanted}")
    return scheme


def _check_device(tensor: StagedTensor, parameter: str, home: Home, catalog: Catalog) -> None:
    """Of blocks alone the scale depends on the kind of device: see ``scales``."""
    live = home.weight.device.type
    if catalog.format is StageFormat.FP8_PER_BLOCK and catalog.device != live:
        why = f"its scales are those of device {catalog.device!r}, and this parameter is on {live!r}"
        raise _refused(tensor, parameter, catalog.format, why, f"open the stage with device {live!r}")


def _check_group(tensor: StagedTensor, parameter: str, fused: Sequence[str], catalog: Catalog) -> None:
    group = {one.name for one in catalog.group_of(tensor)}
    if group != set(fused):
        why = (
            f"the engine has one scale for {', '.join(fused)}, and the stage one for {', '.join(sorted(group))}: "
            "their group has to be what the engine fuses"
        )
        raise _refused(tensor, parameter, StageFormat.FP8_PER_TENSOR, why, "open the stage with the engine's groups")


def _fused(cut: Sequence[tuple[Matrix, Home]], catalog: Catalog) -> dict[tuple[str, Shape], Sequence[str]]:
    """Per parameter and leading index, the tensors that are there, each once."""
    found: dict[tuple[str, Shape], dict[str, None]] = {}
    for matrix, _ in cut:
        place = matrix.entry.region.parameter, matrix.leading
        found.setdefault(place, {})[catalog.tensor(matrix.entry.tensor).name] = None
    return {place: tuple(names) for place, names in found.items()}


def _off_blocks(cut: Sequence[tuple[Matrix, Home]], catalog: Catalog) -> dict[str, str]:
    """Parameters, each with a tensor that may share a block there with another: its scale is then neither's own."""
    return {
        matrix.entry.region.parameter: matrix.entry.tensor
        for matrix, home in cut
        if home.scheme is FP8_PER_BLOCK and not falls_on_blocks(matrix, catalog.tensor(matrix.entry.tensor).shape)
    }


def _refused(
    tensor: StagedTensor, parameter: str, held: StageFormat, why: str, otherwise: str | None = None
) -> PlanRefused:
    remedy = f"open the stage with {tensor.name} as {tensor.quantized_from}"
    return PlanRefused(
        f"{tensor.name} is staged in {held}, and cannot be copied into {parameter}: {why}",
        remedy=remedy if otherwise is None else f"{otherwise}, or {remedy}",
        tensor=tensor.name,
        parameter=parameter,
    )
