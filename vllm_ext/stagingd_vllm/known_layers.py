# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Layers of engines that were started from FP8 checkpoints: by class, how they are quantized once they are loaded.

What vLLM keeps of such a checkpoint is what it keeps of its own online quantization: one weight, and scales of its
granularity. A stage holds neither the checkpoint's bytes nor its scales, so that a layer whose activations need a scale
out of the checkpoint is not known here.

Nothing here imports vLLM: classes are known by their names, which stand here for 0.26 and 0.32 alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from stagingd.moments import BLOCK
from stagingd_vllm.schemes import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme

_INPUT_SCALES: Final = ("input_scale", "w13_input_scale", "w2_input_scale")


class NotKnown(ValueError):
    """How a layer is quantized is not known; says why."""


def fp8_blocks_or_tensors(layer: torch.nn.Module) -> Scheme:
    """``Fp8LinearMethod`` and ``Fp8MoEMethod``: blocks as DeepSeek's and Qwen's checkpoints have them, or none."""
    _check_activations(layer)
    method: Any = layer.quant_method
    if method.weight_block_size is None:
        return FP8_PER_TENSOR
    # Where tensor parallelism cuts blocks of experts, vLLM makes finer ones, or gives ranks unequal parts.
    if getattr(getattr(method, "moe", None), "tp_shard_with_padding", False):
        raise NotKnown("ranks hold whole blocks of the checkpoint, and not the parts that experts' loader gives them")
    return _of_blocks(getattr(method, "moe_block_shape", method.weight_block_size))


def compressed_linear(layer: torch.nn.Module) -> Scheme:
    """``CompressedTensorsLinearMethod``: the layer's scheme says what is done."""
    scheme: Any = getattr(layer, "scheme", None)
    name = type(scheme).__name__
    if name != "CompressedTensorsW8A8Fp8":
        raise NotKnown(f"quantization by scheme {name} is not known")
    _check_activations(layer)
    return _of_strategy(scheme.weight_quant, {"channel": FP8_PER_CHANNEL, "tensor": FP8_PER_TENSOR})


def compressed_experts(layer: torch.nn.Module) -> Scheme:
    """``CompressedTensorsW8A8Fp8MoEMethod``."""
    _check_activations(layer)
    method: Any = layer.quant_method
    return _of_strategy(method.weight_quant, {"channel": FP8_PER_CHANNEL})


def _of_strategy(weights: Any, known: dict[str, Scheme]) -> Scheme:
    name = str(getattr(weights.strategy, "value", weights.strategy))
    if name == "block":
        return _of_blocks(weights.block_structure)
    if name not in known:
        raise NotKnown(f"weights of strategy {name!r} are not known, and of {', '.join(known)} and block they are")
    return known[name]


def _of_blocks(size: Iterable[int]) -> Scheme:
    found = list(size)
    if found != [BLOCK, BLOCK]:
        raise NotKnown(f"blocks of {found} are not known, and of {[BLOCK, BLOCK]} they are")
    return FP8_PER_BLOCK


def _check_activations(layer: torch.nn.Module) -> None:
    for name in _INPUT_SCALES:
        if getattr(layer, name, None) is not None:
            raise NotKnown(
                f"activations are quantized with a static {name}, which belongs to the checkpoint's weights: "
                "a stage holds none for those that it brings"
            )


LINEAR_OF_CHECKPOINTS: Final[dict[str, Callable[[torch.nn.Module], Scheme]]] = {
    "Fp8LinearMethod": fp8_blocks_or_tensors,
    "CompressedTensorsLinearMethod": compressed_linear,
}

EXPERTS_OF_CHECKPOINTS: Final[dict[str, Callable[[torch.nn.Module], Scheme]]] = {
    "Fp8MoEMethod": fp8_blocks_or_tensors,
    "CompressedTensorsW8A8Fp8MoEMethod": compressed_experts,
}
