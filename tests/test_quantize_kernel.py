# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that quantizes strips against its reference in torch: under Triton's interpreter on CPUs, compiled
where a GPU is."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence

import pytest
import torch
from devices import quantize_in_torch
from stagingd_client import LocalShard, flush_plan
from stagingd_client.holdings import Holdings
from stagingd_client.naming import SameNames
from stagingd_client.strips import QuantizingWork

from stagingd.boxes import subtract, whole
from stagingd.catalog import TensorDeclaration, build
from stagingd.formats import Quantization, StageFormat
from stagingd.moments import ALL_GRIDS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from stagingd_client.gpu_quantize import quantize_strips  # noqa: E402

SCRATCH = 2**19


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 2).to(dtype)


def odd() -> torch.Tensor:
    """NaN, infinity, zeros, and what is too small to matter."""
    values = noise(130, 140)
    values[3, 5], values[3, 6], values[127, 139] = torch.nan, torch.inf, -torch.inf
    values[9], values[10] = 0.0, -0.0
    values[11] *= 1e-30
    return values


def shard(values: torch.Tensor, shape: Sequence[int], offset: Sequence[int]) -> LocalShard:
    return LocalShard(values, tuple(shape), tuple(offset))


CASES = {
    "whole blocks": shard(noise(128, 256), (128, 256), (0, 0)),
    "bfloat16 as it is": shard(noise(128, 256, dtype=torch.bfloat16), (128, 256), (0, 0)),
    "float16": shard(noise(64, 72, dtype=torch.float16), (64, 72), (0, 0)),
    "rows and columns inside blocks": shard(noise(101, 77), (301, 277), (70, 150)),
    "aligned, but not whole blocks": shard(noise(40, 136), (40, 136), (0, 0)),
    "several matrices": shard(noise(2, 20, 140), (3, 30, 140), (1, 4, 0)),
    "columns first": shard(noise(60, 50).t(), (50, 60), (0, 0)),
    "every second row": shard(noise(80, 128)[::2], (40, 128), (0, 0)),
    "odd values": shard(odd(), (130, 140), (0, 0)),
}


def quantized(
    quantize: Callable[[QuantizingWork], None], part: LocalShard, form: StageFormat, scales_from: int, on: str
) -> list[torch.Tensor]:
    """The packed bytes, chunk by chunk."""
    given = torch.empty_strided(part.tensor.shape, part.tensor.stride(), dtype=part.tensor.dtype, device=on)
    given.copy_(part.tensor)
    holdings = Holdings(0, SameNames(), {"w": LocalShard(given, part.global_shape, part.offset)})
    mine = holdings.declarations(torch.bfloat16, frozenset())
    others = subtract(whole(mine[0].shape), mine[0].boxes[0])
    declared = [mine, [TensorDeclaration(name="w", dtype="bfloat16", shape=mine[0].shape, boxes=tuple(others))]]
    quantization = Quantization(format=form, device="cpu", groups=(("w",),))
    name = f"stage-{uuid.uuid4().hex[:6]}"
    catalog = build(name, declared if others else declared[:1], ALL_GRIDS, quantization=quantization)
    put = holdings.place(catalog, "w", LocalShard(given, part.global_shape, part.offset))
    assert put is not None
    plan, limits = flush_plan.make_quantizing([put], {"w": catalog.owned_by(0)}, catalog, SCRATCH)
    jobs = torch.from_numpy(plan.jobs.copy())
    jobs[:, 0] = torch.from_numpy(plan.addresses(torch.tensor([given.data_ptr()]).numpy()))
    jobs, strips = jobs.to(on), torch.from_numpy(plan.strips).to(on)
    scales = torch.rand(limits.count, generator=torch.Generator().manual_seed(scales_from)) * 0.02
    found = []
    for _, launches in plan.chunks:
        scratch = torch.full((SCRATCH,), 9, dtype=torch.uint8, device=on)
        for launch in launches:
            work = (jobs, strips, launch.first_strip, launch.count, scratch, scales.to(on), launch.kind, form)
            quantize(QuantizingWork(*work))
        found.append(scratch.cpu())
    return found


@pytest.mark.parametrize("form", list(StageFormat))
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_makes_the_bytes_that_its_reference_makes(case: str, form: StageFormat) -> None:
    part = CASES[case]
    if form is StageFormat.FP8_PER_TENSOR and part.tensor.dim() > 2:
        part = shard(part.tensor[0], part.global_shape[1:], part.offset[1:])  # type: ignore[index]
    wanted = quantized(quantize_in_torch, part, form, 1, "cpu")
    for made, expected in zip(quantized(quantize_strips, part, form, 1, DEVICE), wanted, strict=True):
        assert torch.equal(made, expected)
