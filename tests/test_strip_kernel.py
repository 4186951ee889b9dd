# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel against its reference in torch: under Triton's interpreter on CPUs, compiled where a GPU is."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence

import pytest
import torch
from devices import cast_in_torch
from stagingd_client import LocalShard, flush_plan
from stagingd_client.flush_plan import Plan
from stagingd_client.holdings import Holdings
from stagingd_client.naming import SameNames
from stagingd_client.strips import STRIP_FIELDS, Work

from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration, build
from stagingd.formats import Quantization, StageFormat
from stagingd.moments import ALL_GRIDS, field_stride

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from stagingd_client.gpu_moments import cast_strips  # noqa: E402

SCRATCH = 2**20

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def shard(values: torch.Tensor, shape: Sequence[int], offset: Sequence[int]) -> LocalShard:
    return LocalShard(values, tuple(shape), tuple(offset))


def plan_of(part: LocalShard, on: str, quantization: Quantization | None = None) -> tuple[Plan, torch.Tensor]:
    """The plan of one shard, staged as bfloat16 or quantized, and the shard on a device with its own strides."""
    given = torch.empty_strided(part.tensor.shape, part.tensor.stride(), dtype=part.tensor.dtype, device=on)
    given.copy_(part.tensor)
    moved = LocalShard(given, part.global_shape, part.offset)
    holdings = Holdings(0, SameNames(), {"w": moved})
    mine = holdings.declarations(torch.bfloat16, frozenset())
    shape = mine[0].shape
    others = [Box((0,) * len(shape), shape)] if not mine[0].boxes else rest_of(shape, mine[0].boxes[0])
    declared = [mine, [TensorDeclaration(name="w", dtype="bfloat16", shape=shape, boxes=tuple(others))]]
    some = declared if others else declared[:1]
    catalog = build(f"stage-{uuid.uuid4().hex[:6]}", some, ALL_GRIDS, quantization=quantization)
    put = holdings.place(catalog, "w", moved)
    assert put is not None
    return flush_plan.make([put], {"w": catalog.owned_by(0)}, catalog, SCRATCH), given


def rest_of(shape: Sequence[int], box: Box) -> list[Box]:
    from stagingd.boxes import subtract, whole  # noqa: PLC0415

    return subtract(whole(shape), box)


def run(cast: Callable[[Work], None], plan: Plan, given: torch.Tensor, on: str) -> list[Found]:
    """What the kernel leaves behind, chunk by chunk: the packed values, the cells and the strips' moments."""
    jobs = torch.from_numpy(plan.jobs.copy())
    address = torch.tensor([given.data_ptr()]).numpy()
    jobs[:, 0] = torch.from_numpy(plan.addresses(address))
    jobs, strips = jobs.to(on), torch.from_numpy(plan.strips).to(on)
    found = []
    for chunk, launches in plan.chunks:
        scratch = torch.full((SCRATCH // 2,), 9.0, dtype=torch.bfloat16, device=on)
        stride = field_stride(chunk.cells) // 4
        cells = torch.full((STRIP_FIELDS, stride), 9.0, device=on)
        partials = torch.zeros(STRIP_FIELDS, len(strips), device=on)
        for launch in launches:
            count = launch.count
            cast(Work(jobs, strips, launch.first_strip, count, scratch, cells, partials, launch.kind, True, True))
        found.append((scratch.cpu(), cells.cpu(), partials.cpu()))
    return found


def noise(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 2 + mean).to(dtype)


def poisoned() -> torch.Tensor:
    values = noise(128, 256)
    values[3, 5], values[3, 6], values[127, 255] = torch.nan, torch.inf, -torch.inf
    values[9] = torch.nan  # a row without a single finite value
    return values


CASES = {
    "whole blocks": shard(noise(128, 256), (128, 256), (0, 0)),
    "bfloat16 as it is": shard(noise(128, 256, dtype=torch.bfloat16), (128, 256), (0, 0)),
    "float16": shard(noise(64, 72, dtype=torch.float16), (64, 72), (0, 0)),
    "rows and columns inside blocks": shard(noise(101, 77), (301, 277), (70, 150)),
    "aligned, but not whole blocks": shard(noise(40, 136), (40, 136), (0, 0)),
    "a vector": shard(noise(200, mean=1.0), (200,), (0,)),
    "a scalar": shard(noise(), (), ()),
    "several matrices": shard(noise(2, 20, 140), (3, 30, 140), (1, 4, 0)),
    "columns first": shard(noise(60, 50).t(), (50, 60), (0, 0)),
    "every second row": shard(noise(80, 128)[::2], (40, 128), (0, 0)),
    "NaN and infinity": shard(poisoned(), (128, 256), (0, 0)),
    "far from zero": shard(noise(64, 128, mean=1000.0), (64, 128), (0, 0)),
    "what bfloat16 rounds to infinity": shard(torch.full((8, 8), 3.4e38), (8, 8), (0, 0)),
    "ties, to even": shard((torch.arange(256.0).view(2, 128) * 2**-8 + 1), (2, 128), (0, 0)),
    "denormal numbers": shard(noise(8, 16) * 1e-39, (8, 16), (0, 0)),
}


QUANTIZED = Quantization(format=StageFormat.FP8_PER_CHANNEL, device="cpu", groups=(("w",),))
MEASURED = [case for case in CASES if CASES[case].tensor.dim() > 1]
"""What trainers may quantize: its moments are taken, and nothing is packed."""


@pytest.mark.parametrize(
    ("case", "quantization"), [*((case, None) for case in CASES), *((case, QUANTIZED) for case in MEASURED)]
)
def test_the_kernel_does_what_its_reference_does(case: str, quantization: Quantization | None) -> None:
    on_host, here = plan_of(CASES[case], "cpu", quantization)
    on_device, there = plan_of(CASES[case], DEVICE, quantization)
    wanted = run(cast_in_torch, on_host, here, "cpu")
    for (scratch, cells, partials), (scratch_1, cells_1, partials_1) in zip(
        run(cast_strips, on_device, there, DEVICE), wanted, strict=True
    ):
        assert torch.equal(scratch.isnan(), scratch_1.isnan())  # which NaN it is differs between processors
        assert torch.equal(scratch.nan_to_num().view(torch.int16), scratch_1.nan_to_num().view(torch.int16))
        for table, table_1 in ((cells, cells_1), (partials, partials_1)):
            assert torch.equal(table[2:].view(torch.int32), table_1[2:].view(torch.int32))  # amax, non-finite values
            torch.testing.assert_close(table[:2], table_1[:2], rtol=2e-6, atol=1e-6)


def test_cases_take_every_kind_of_kernel() -> None:
    kinds = {launch.kind for part in CASES.values() for _, some in plan_of(part, "cpu")[0].chunks for launch in some}
    assert {(kind.dense, kind.aligned, kind.full) for kind in kinds} == {
        (True, True, True),
        (True, True, False),
        (True, False, False),
        (False, False, False),
    }
