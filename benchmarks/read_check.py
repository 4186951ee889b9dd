# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a live parameter has to be, found from the stage's whole tensors without moments, moves or kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from stagingd_vllm.exactness import Exactness, cell_amax
from stagingd_vllm.layouts import Home
from stagingd_vllm.plan import PlanEntry
from stagingd_vllm.quantize import quantize
from stagingd_vllm.scales import Granularity

from benchmarks.host_case import BenchmarkFailed
from stagingd.boxes import Shape, whole
from stagingd.moments import BLOCK


def compare(home: Home, shape: Shape, entries: Sequence[PlanEntry], read: Callable[[str], torch.Tensor]) -> Exactness:
    """A parameter against what the tensors say that fill it, each of them staged as a matrix or a vector.

    Args:
        home: where it lives.
        shape: as its loader sees it.
        entries: the plan's, for this parameter.
        read: gives a staged tensor whole, of the version that it should be.

    Raises:
        BenchmarkFailed: how its scheme is checked is not known here.
    """
    loaded = torch.zeros(shape, dtype=getattr(torch, entries[0].dtype), device=home.weight.device)
    tensors = {entry.tensor: read(entry.tensor).to(loaded.device) for entry in entries}
    for entry in entries:
        region = entry.region
        loaded.as_strided(region.shape, region.stride, region.offset).copy_(tensors[entry.tensor][entry.source.slices])
    if home.scheme is None:
        return Exactness(bytes=home.weight.nbytes, differing_bytes=_differing(home.weight, loaded))
    if home.scale is None or home.scheme.live != "float8_e4m3fn":
        raise BenchmarkFailed(f"{home.scheme.name} is not checked here", remedy="measure an FP8 mode")
    matrices = padded(loaded, home).reshape(-1, *home.weight.shape[-2:])
    limits = _limits(home.scheme.granularity, matrices, shape, entries, tensors)
    scales = home.scheme.formula(limits, limits.device)
    made = torch.stack(
        [
            quantize(matrix, scale, home.scheme.granularity, whole(tuple(matrix.shape)))
            for matrix, scale in zip(matrices, scales, strict=True)
        ]
    )
    return Exactness(
        home.weight.nbytes,
        home.scale.numel(),
        _differing(home.weight, made),
        int((home.scale.view(-1) != scales.view(-1)).sum()),
    )


def padded(loaded: torch.Tensor, home: Home) -> torch.Tensor:
    """What was loaded, in the shape in which it lives. Experts whose parts live as whole blocks: zeros between."""
    if loaded.shape == home.weight.shape:
        return loaded
    _, rows, columns = home.weight.shape
    parts = loaded.unflatten(1, (home.parts, -1))
    missing = (0, columns - parts.shape[3], 0, rows // home.parts - parts.shape[2])
    return F.pad(parts, missing).flatten(1, 2)


def _limits(
    granularity: Granularity,
    matrices: torch.Tensor,
    shape: Shape,
    entries: Sequence[PlanEntry],
    tensors: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The largest magnitude that each scale represents: of whole tensors and whole rows, however they are cut."""
    if granularity is Granularity.BLOCK:
        return torch.stack([cell_amax(matrix, (BLOCK, BLOCK)) for matrix in matrices])
    limits = torch.zeros(len(matrices), shape[-2], 1, device=matrices.device)
    for entry in entries:
        first, tensor = entry.region.offset // shape[-1], tensors[entry.tensor]
        rows = limits.flatten(0, 1)[first : first + entry.source.lengths[0]]
        whole_rows = tensor[entry.source.slices[0]].abs().amax(1, keepdim=True).float()
        rows.copy_(whole_rows if granularity is Granularity.CHANNEL else tensor.abs().amax())
    return limits if granularity is Granularity.CHANNEL else limits.amax(1, keepdim=True)


def _differing(live: torch.Tensor, wanted: torch.Tensor) -> int:
    """How many bytes differ."""
    mine, theirs = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (live, wanted))
    return int((mine != theirs).sum())
