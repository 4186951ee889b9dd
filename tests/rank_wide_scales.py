# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The rule of newer vLLM, the maximum over ranks, for the online FP8 of vLLM 0.26, whose scales are each rank's own.

Only the choice of scales is replaced; bytes are made as 0.26 makes them. Imported in a worker, before its model is
loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from stagingd_vllm.quantize import quantize
from stagingd_vllm.scales import Granularity, scales
from vllm import _custom_ops
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.quantization.online import fp8

from stagingd.boxes import whole

_cut: dict[int, tuple[bool, bool]] = {}
"""Weights that are being quantized, by address: whether ranks share out their rows, and their columns."""


def install() -> None:
    """Does nothing where vLLM has the rule itself."""
    if hasattr(fp8, "amax_for_tp_weight_quant"):
        return
    for name in ("Fp8PerTensorOnlineLinearMethod", "Fp8PtpcOnlineLinearMethod"):
        _wrap(getattr(fp8, name), _linear)
    for name in ("Fp8PerTensorOnlineMoEMethod", "Fp8PtpcOnlineMoEMethod"):
        _wrap(getattr(fp8, name), _experts)
    fp8.ops = _Operations()


class _Operations:
    """vLLM's own operations, but for one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_custom_ops, name)

    def scaled_fp8_quant(
        self, weight: torch.Tensor, scale: torch.Tensor | None = None, *, use_per_token_if_dynamic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert scale is None
        rows_shared, columns_shared = _cut[weight.untyped_storage().data_ptr()]
        granularity = Granularity.CHANNEL if use_per_token_if_dynamic else Granularity.TENSOR
        per_row = granularity is Granularity.CHANNEL
        amax = weight.abs().amax(1, keepdim=True).float() if per_row else weight.abs().amax().float().view(1)
        if columns_shared or (rows_shared and not per_row):
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, get_tp_group().device_group)
        made = scales(amax, granularity)
        if per_row:  # as the kernel that finds its own scales divides, and the one that is given them multiplies
            return quantize(weight, made, granularity, whole(tuple(weight.shape))), made
        return _custom_ops.scaled_fp8_quant(weight, scale=made)


def _wrap(method: type, cut: Callable[[Any], dict[int, tuple[bool, bool]]]) -> None:
    original = method.process_weights_after_loading

    def process(self: Any, layer: Any) -> None:
        with _noted(cut(layer)):
            original(self, layer)

    method.process_weights_after_loading = process


@contextmanager
def _noted(cut: dict[int, tuple[bool, bool]]) -> Iterator[None]:
    _cut.update(cut)
    yield
    _cut.clear()


def _linear(layer: Any) -> dict[int, tuple[bool, bool]]:
    cut = (
        layer.output_size != layer.output_size_per_partition,
        layer.input_size != layer.input_size_per_partition,
    )
    return {layer.weight.untyped_storage().data_ptr(): cut}


def _experts(layer: Any) -> dict[int, tuple[bool, bool]]:
    shared = layer.moe_config.tp_size > 1
    return {
        layer.w13_weight.untyped_storage().data_ptr(): (shared, False),
        layer.w2_weight.untyped_storage().data_ptr(): (False, shared),
    }
