# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Engines that were started from FP8 checkpoints: which of their layers are known, and what is written into them.

What is written is what vLLM's online quantization makes of a stage's tensors. Here it is held against what the
quantizer of compressed-tensors would have put into a checkpoint of the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from live_layers import Live, experts, linear, named, of_checkpoint
from stagingd_vllm.layouts import LayoutUnknown, homes
from stagingd_vllm.quantize import quantize
from stagingd_vllm.scales import Granularity
from stagingd_vllm.schemes import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, Scheme

from stagingd.boxes import whole

ROWS, COLUMNS, EXPERTS = 256, 384, 2
OF_LINEAR = [
    ("Fp8LinearMethod", "fp8_per_tensor"),
    ("Fp8LinearMethod", "fp8_per_block"),
    ("CompressedTensorsLinearMethod", "fp8_per_tensor"),
    ("CompressedTensorsLinearMethod", "fp8_per_channel"),
    ("CompressedTensorsLinearMethod", "fp8_per_block"),
]
OF_EXPERTS = [
    ("Fp8MoEMethod", "fp8_per_tensor"),
    ("Fp8MoEMethod", "fp8_per_block"),
    ("CompressedTensorsW8A8Fp8MoEMethod", "fp8_per_channel"),
    ("CompressedTensorsW8A8Fp8MoEMethod", "fp8_per_block"),
]


def online(method: str, scheme: str) -> Live:
    """A layer as online quantization leaves it, of the kind that a method is for."""
    return experts(scheme, EXPERTS, ROWS, COLUMNS) if "MoE" in method else linear(scheme, ROWS, COLUMNS)


@pytest.mark.parametrize(("method", "scheme"), OF_LINEAR + OF_EXPERTS)
def test_a_layer_of_a_checkpoint_lives_as_one_of_online_quantization(method: str, scheme: str) -> None:
    layer = online(method, scheme)
    expected = homes(layer)
    found = homes(of_checkpoint(method, scheme, layer))
    assert found.keys() == expected.keys()
    for name, home in found.items():
        other = expected[name]
        assert home.scheme is other.scheme
        assert home.scheme is not None
        assert home.scheme.name == scheme
        assert home.weight.data_ptr() == other.weight.data_ptr()
        assert (home.weight.shape, home.weight.stride()) == (other.weight.shape, other.weight.stride())
        assert home.scale is not None
        assert other.scale is not None
        assert (home.scale.data_ptr(), home.scale.shape) == (other.scale.data_ptr(), other.scale.shape)


def test_the_one_scale_that_merging_leaves_may_have_no_dims() -> None:
    layer = of_checkpoint("Fp8LinearMethod", "fp8_per_tensor", linear("fp8_per_tensor", ROWS, COLUMNS))
    layer.weight_scale = torch.nn.Parameter(torch.tensor(7.0), requires_grad=False)
    scale = homes(layer)["weight"].scale
    assert scale is not None
    assert scale.shape == (1,)
    assert scale.data_ptr() == layer.weight_scale.data_ptr()


def change(name: str, value: object) -> Callable[[Live], None]:
    """Sets an attribute, by a path of names."""
    *path, last = name.split(".")

    def changed(layer: Live) -> None:
        owner: object = layer
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return changed


STATIC = r"static input_scale, which belongs to the checkpoint's weights: a stage holds none"
REFUSED = {
    "static activations, fp8": (OF_LINEAR[0], change("input_scale", torch.ones(())), STATIC),
    "static activations, compressed-tensors": (OF_LINEAR[3], change("input_scale", torch.ones(())), STATIC),
    "static activations, experts": (
        OF_EXPERTS[0],
        change("w2_input_scale", torch.ones(EXPERTS)),
        r"static w2_input_scale, which",
    ),
    "blocks of another size": (
        OF_LINEAR[1],
        change("quant_method.weight_block_size", [64, 128]),
        r"blocks of \[64, 128\] are not known, and of \[128, 128\] they are",
    ),
    "blocks of another size, compressed-tensors": (
        OF_LINEAR[4],
        change("scheme.weight_quant.block_structure", [128, 64]),
        r"blocks of \[128, 64\] are not known",
    ),
    "blocks of experts made finer": (
        OF_EXPERTS[1],
        change("quant_method.moe_block_shape", [64, 64]),
        r"blocks of \[64, 64\] are not known",
    ),
    "ranks that hold whole blocks": (
        OF_EXPERTS[1],
        change("quant_method.moe", named("FusedMoEConfig", tp_shard_with_padding=True, w13_num_shards=2)),
        r"whole blocks of the checkpoint, and not the parts that experts' loader gives them",
    ),
    "another strategy": (
        OF_LINEAR[3],
        change("scheme.weight_quant.strategy", "group"),
        r"weights of strategy 'group' are not known, and of channel, tensor and block they are",
    ),
    "experts per tensor": (
        OF_EXPERTS[2],
        change("quant_method.weight_quant.strategy", "tensor"),
        r"weights of strategy 'tensor' are not known, and of channel and block they are",
    ),
    "another scheme": (
        OF_LINEAR[3],
        change("scheme", named("CompressedTensorsW8A16Fp8")),
        r"quantization by scheme CompressedTensorsW8A16Fp8 is not known",
    ),
    "a kernel of the scheme": (
        OF_LINEAR[3],
        change("scheme.fp8_linear", named("MarlinFP8ScaledMMLinearKernel")),
        r"whether kernel MarlinFP8ScaledMMLinearKernel rearranges",
    ),
    "a kernel that rounds scales": (
        OF_LINEAR[1],
        change("quant_method.fp8_linear", named("DeepGemmFp8BlockScaledMMKernel")),
        r"whether kernel DeepGemmFp8BlockScaledMMKernel rearranges",
    ),
    "a backend that swaps gate and up": (
        OF_EXPERTS[1],
        change("quant_method.fp8_backend", named("Backend", name="FLASHINFER_CUTLASS")),
        r"experts' backend \['FLASHINFER_CUTLASS'\] keeps weights is not known",
    ),
    "scales that are powers of two": (
        OF_LINEAR[1],
        change("weight_scale_inv", torch.nn.Parameter(torch.ones(2, 3).to(torch.float8_e8m0fnu), requires_grad=False)),
        r"no float32 scales",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_known_of_a_checkpoints_layer_is_refused_by_name(why: str) -> None:
    (method, scheme), changed, words = REFUSED[why]
    layer = of_checkpoint(method, scheme, online(method, scheme))
    assert homes(layer)
    changed(layer)
    with pytest.raises(LayoutUnknown, match=rf"layer model \(Live, {method}\): .*{words}"):
        homes(layer)


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Rows of many magnitudes; no row is so small that the engine's floors matter."""
    generator = torch.Generator().manual_seed(0)
    rows = 0.002 + torch.rand(ROWS, 1, generator=generator) * 0.05
    return (torch.randn(ROWS, COLUMNS, generator=generator) * rows).bfloat16().to(dtype)


def by_compressed_tensors(values: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and scales that its quantizer makes; it computes in the dtype of the values."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    blocks = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, **blocks)
    least, most = (_reduced(values, strategy, reduce) for reduce in (torch.amin, torch.amax))
    scale, zero = quantization.utils.calculate_qparams(least, most, args)
    return lifecycle.quantize(values, scale, zero, args, dtype=torch.float8_e4m3fn), scale


def by_stagingd(values: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    amax = _reduced(values.float().abs(), scheme.granularity.value, torch.amax)
    scale = scheme.formula(amax, amax.device)
    return quantize(values, scale, scheme.granularity, whole(tuple(values.shape))), scale


def _reduced(values: torch.Tensor, granularity: str, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    if granularity == Granularity.BLOCK.value:
        return reduce(values.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)), dim=(1, 3))
    return reduce(values, dim=-1 if granularity == Granularity.CHANNEL.value else (0, 1), keepdim=True)


@pytest.mark.parametrize("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK], ids=lambda scheme: scheme.name)
def test_the_quantizer_of_compressed_tensors_makes_the_same_of_float32(scheme: Scheme) -> None:
    """But for what lies in the middle of two steps: it divides, and the engine, but per channel, multiplies."""
    values = weights(torch.float32)
    found, scale = by_compressed_tensors(values, scheme.granularity.value)
    ours, our_scale = by_stagingd(values, scheme)
    assert scale.dtype == torch.float32
    steps = (found.view(torch.uint8).int() - ours.view(torch.uint8).int()).abs()
    assert scale.reshape(-1).equal(our_scale.reshape(-1))
    assert steps.max() <= (0 if scheme is FP8_PER_CHANNEL else 1)
    assert (steps > 0).float().mean() < 0.002


@pytest.mark.parametrize("scheme", [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK], ids=lambda scheme: scheme.name)
def test_in_bfloat16_it_rounds_scales_and_moves_few_bytes_by_one_step(scheme: Scheme) -> None:
    values = weights(torch.bfloat16)
    found, scale = by_compressed_tensors(values, scheme.granularity.value)
    ours, our_scale = by_stagingd(values, scheme)
    assert scale.dtype == torch.bfloat16
    # It takes bfloat16 for the scale, and for each value's quotient, that FP8 then rounds again.
    torch.testing.assert_close(scale.float(), our_scale, rtol=2**-8, atol=0)
    steps = (found.view(torch.uint8).int() - ours.view(torch.uint8).int()).abs()
    assert steps.max() == 1
    assert 0 < (steps > 0).float().mean() < 0.08
