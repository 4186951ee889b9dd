# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Scales and bytes are those of vLLM's own functions where these run on a GPU. ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from stagingd_vllm.exactness import cell_amax
from stagingd_vllm.quantize import quantize
from stagingd_vllm.scales import Granularity, scales

from stagingd.boxes import whole

pytestmark = pytest.mark.gpu

SHAPE = (1024, 4096)


def weight(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.rand(SHAPE[0], 1, device="cuda", generator=generator) * 4
    return (torch.randn(SHAPE, device="cuda", generator=generator) * rows * 10.0 ** (seed % 5 - 3)).bfloat16()


@pytest.mark.parametrize("seed", range(8))
def test_per_block_scales_are_vllms_and_of_its_bytes_all_but_one_in_a_million(seed: int) -> None:
    deep_gemm = pytest.importorskip("vllm.utils.deep_gemm")
    values = weight(seed)
    theirs, scale = deep_gemm.per_block_cast_to_fp8(values, [128, 128], use_ue8m0=False)
    assert torch.equal(scales(cell_amax(values, (128, 128)), Granularity.BLOCK), scale)
    mine = quantize(values, scale, Granularity.BLOCK, whole(SHAPE))
    steps = (mine.view(torch.int8).int() - theirs.view(torch.int8).int()).abs()
    # As vLLM compiles this function, its reciprocals are approximate.
    assert steps.max() <= 1
    assert int(steps.sum()) <= values.numel() // 1_000_000


@pytest.mark.parametrize("seed", range(8))
def test_per_tensor_and_per_channel_every_scale_and_byte_is_vllms(seed: int) -> None:
    operations = pytest.importorskip("vllm._custom_ops")
    values = weight(seed)
    for granularity, cell in ((Granularity.TENSOR, SHAPE), (Granularity.CHANNEL, (1, SHAPE[1]))):
        per_row = granularity is Granularity.CHANNEL
        theirs, scale = operations.scaled_fp8_quant(values, scale=None, use_per_token_if_dynamic=per_row)
        made = scales(cell_amax(values, cell), granularity)
        assert torch.equal(made.view(-1), scale.view(-1))
        mine = quantize(values, made, granularity, whole(SHAPE))
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
