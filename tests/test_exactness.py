# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""FP8 from a slice and merged moments is FP8 from the whole tensor, for every layout, cut and granularity."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stagingd_client.flush import Flusher
from stagingd_vllm.exactness import Exactness, cell_amax, compare_slice
from stagingd_vllm.quantize import dequantize, quantize
from stagingd_vllm.reader import Lease
from stagingd_vllm.scales import FP8_MAX, Granularity, ScaleRule, ScaleRuleRefused, scales

from stagingd import segment
from stagingd.boxes import Box, relative, whole
from stagingd.catalog import TensorDeclaration, build
from stagingd.moments import ALL_GRIDS, Grid, Moments


def staged(tensor: torch.Tensor, boxes: list[Box]) -> Iterator[Lease]:
    """A lease on a tensor that as many ranks have flushed into a real segment as there are boxes."""
    shape = tuple(tensor.shape)
    ranks = [[TensorDeclaration(name="w", dtype="bfloat16", shape=shape, boxes=(box,))] for box in boxes]
    catalog = build("policy", ranks, ALL_GRIDS)
    made = segment.create(f"/stagingd-test-{uuid.uuid4().hex[:12]}", catalog, lock=False)
    try:
        flusher = Flusher(made, {})
        for owned in catalog.owned:
            flusher.write(0, owned, tensor[owned.box.slices])
        memory = torch.frombuffer(made.slot(0), dtype=torch.uint8)
        yield Lease(catalog, 1, memory, made.moments(0), time.monotonic() + 60, lambda: None)
    finally:
        made.unlink()


def cut(length: int, where: float) -> int:
    return max(1, min(length - 1, round(length * where)))


fraction = st.floats(0.05, 0.95)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(2, 400),
    columns=st.integers(2, 400),
    seed=st.integers(0, 2**31),
    trainer_cut=fraction,
    by_rows=st.booleans(),
    top=fraction,
    left=fraction,
    size=fraction,
)
def test_a_slice_quantizes_to_the_same_bytes_as_the_whole(
    rows: int, columns: int, seed: int, trainer_cut: float, by_rows: bool, top: float, left: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
    at = cut(rows if by_rows else columns, trainer_cut)
    parts = (
        [Box((0, 0), (at, columns)), Box((at, 0), (rows - at, columns))]
        if by_rows
        else [Box((0, 0), (rows, at)), Box((0, at), (rows, columns - at))]
    )
    first, start = cut(rows, top), cut(columns, left)
    box = Box((first, start), (max(1, round((rows - first) * size)), max(1, round((columns - start) * size))))
    for lease in staged(tensor, parts):
        for granularity in Granularity:
            found = compare_slice(lease, "w", box, granularity)
            assert found.exact, (granularity, found)


def test_a_scale_from_the_slice_alone_would_not_be_that_of_the_whole() -> None:
    """The comparison notices what merged moments are there to prevent."""
    tensor = torch.ones(4, 256).bfloat16()
    tensor[:, 128:] = 7.0
    for lease in staged(tensor, [Box((0, 0), (4, 256))]):
        part = Box((0, 0), (4, 100))
        from_slice = scales(cell_amax(lease.read("w", part), (4, 100)), Granularity.TENSOR)
        from_whole = scales(ScaleRule().limits(lease.moments("w", Grid.TENSOR, part)), Granularity.TENSOR)
        assert from_slice != from_whole
        assert not Exactness(4, 1, 1, 0).exact
        assert not Exactness().exact


@pytest.mark.parametrize("granularity", Granularity)
def test_quantization_is_as_close_as_fp8_can_be(granularity: Granularity) -> None:
    values = (torch.randn(200, 300, generator=torch.Generator().manual_seed(3)) * 0.02).bfloat16()
    box = whole((200, 300))
    for lease in staged(values, [box]):
        scale = scales(ScaleRule().limits(lease.moments("w", granularity.grid)), granularity)
        back = dequantize(quantize(values, scale, granularity, box), scale, granularity, box)
        step = 2.0**-3 / 2  # three mantissa bits: half a step, relative
        smallest = scale.max() * 2.0**-9
        assert ((back - values.float()).abs() <= values.float().abs() * step * 1.01 + smallest).all()
        assert back.abs().max() == pytest.approx(values.float().abs().max().item(), rel=1e-6)


def test_scales_are_the_engines_formulae() -> None:
    limits = torch.tensor([0.0, 1e-6, 3.0], dtype=torch.float32)
    assert torch.equal(scales(limits, Granularity.TENSOR), limits / FP8_MAX)
    assert scales(limits, Granularity.CHANNEL)[0] == torch.tensor(1.0 / (FP8_MAX * 512.0))
    assert scales(limits, Granularity.BLOCK)[0] == torch.tensor(1e-4) / FP8_MAX


def test_the_sigma_rule_clips_at_mean_and_standard_deviations_but_never_above_amax() -> None:
    values = torch.zeros(1, 1000)
    values[0, :2] = torch.tensor([10.0, -10.0])
    for lease in staged(values, [Box((0, 0), (1, 1000))]):
        moments: Moments = lease.moments("w", Grid.TENSOR)
        deviation = (200.0 / 1000) ** 0.5
        assert ScaleRule.parse("sigma:4").limits(moments).item() == pytest.approx(4 * deviation, rel=1e-6)
        assert ScaleRule.parse("sigma:400").limits(moments).item() == 10.0
        assert ScaleRule.parse("amax").limits(moments).item() == 10.0


@pytest.mark.parametrize("text", ["", "max", "sigma", "sigma:", "sigma:-1", "sigma:nan", "amax:3"])
def test_an_unknown_scale_rule_is_refused(text: str) -> None:
    with pytest.raises(ScaleRuleRefused, match="is no scale rule"):
        ScaleRule.parse(text)


def test_relative_boxes_find_the_slice_in_the_whole() -> None:
    tensor = torch.arange(12.0).view(3, 4).bfloat16()
    for lease in staged(tensor, [Box((0, 0), (3, 4))]):
        box = Box((1, 1), (2, 2))
        assert torch.equal(lease.read("w", box), tensor[relative(box, whole((3, 4))).slices])


def test_per_block_the_scale_is_the_quotient_on_a_cpu_and_a_product_on_a_gpu() -> None:
    limits = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) * 4
    divided, multiplied = (scales(limits, Granularity.BLOCK, torch.device(name)) for name in ("cpu", "cuda"))
    assert torch.equal(divided, scales(limits, Granularity.BLOCK))
    assert torch.equal(multiplied, limits.clamp_min(1e-4) * torch.tensor(1 / FP8_MAX))
    assert 0 < (divided != multiplied).sum() < 10_000
    assert torch.allclose(divided, multiplied, rtol=2**-22)
