# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Layers as vLLM leaves them after loading, for each scheme: the names of its classes, its layouts, and no more."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn


def named(class_name: str, **attributes: object) -> object:
    """An object whose class has a name of vLLM's."""
    return type(class_name, (), attributes)()


class Live(torch.nn.Module):
    """A layer with the parameters that it is given."""

    def __init__(self, quant_method: object | None = None, **parameters: torch.Tensor) -> None:
        super().__init__()
        if quant_method is not None:
            self.quant_method = quant_method
        for name, tensor in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def linear(scheme: str, rows: int, columns: int, device: str = "cpu") -> Live:
    """A linear layer; its bytes and scales are what nobody wants."""
    if scheme == "plain":
        return Live(
            named("UnquantizedLinearMethod"), weight=torch.full((rows, columns), 7.0, dtype=torch.bfloat16).to(device)
        )
    weight = torch.full((rows, columns), 7.0).to(FP8).to(device)
    if scheme == "fp8_per_block":
        method = named("Fp8PerBlockOnlineLinearMethod", fp8_linear=named("CutlassFp8BlockScaledMMKernel"))
        scale = torch.full((-(-rows // 128), -(-columns // 128)), 7.0, device=device)
        return Live(method, weight=weight, weight_scale_inv=scale)
    kernel = named("CutlassFP8ScaledMMLinearKernel")
    if scheme == "fp8_per_tensor":
        method = named("Fp8PerTensorOnlineLinearMethod", fp8_linear=kernel)
        return Live(method, weight=weight.t(), weight_scale=torch.full((1,), 7.0, device=device))
    method = named("Fp8PtpcOnlineLinearMethod", fp8_linear=kernel)
    return Live(method, weight=weight.t(), weight_scale=torch.full((rows, 1), 7.0, device=device))


def experts(scheme: str, count: int, inner: int, hidden: int, device: str = "cpu") -> Live:
    """Experts: gate and up in w13, down in w2."""
    sizes = {"w13": (count, 2 * inner, hidden), "w2": (count, hidden, inner)}
    dtype = {"plain": torch.bfloat16, "int8_per_channel_weight_only": torch.int8}.get(scheme, FP8)
    made = {f"{name}_weight": torch.full(size, 7.0).to(dtype).to(device) for name, size in sizes.items()}
    backend = named("TRITON", name="TRITON")
    if scheme == "plain":
        return Live(named("UnquantizedFusedMoEMethod", unquantized_backend=backend), **made)
    if scheme == "int8_per_channel_weight_only":
        for name, (_, rows, _) in sizes.items():
            made[f"{name}_scale"] = torch.full((count, rows), 7.0, device=device)
        return Live(named("Int8OnlineMoEMethod", int8_backend=backend), **made)
    for name, (_, rows, columns) in sizes.items():
        if scheme == "fp8_per_tensor":
            made[f"{name}_weight_scale"] = torch.full((count,), 7.0, device=device)
        elif scheme == "fp8_per_channel":
            made[f"{name}_weight_scale"] = torch.full((count, rows, 1), 7.0, device=device)
        else:
            size = count, -(-rows // 128), -(-columns // 128)
            made[f"{name}_weight_scale_inv"] = torch.full(size, 7.0, device=device)
    method = {
        "fp8_per_tensor": "Fp8PerTensorOnlineMoEMethod",
        "fp8_per_channel": "Fp8PtpcOnlineMoEMethod",
        "fp8_per_block": "Fp8PerBlockOnlineMoEMethod",
    }[scheme]
    return Live(named(method, fp8_backend=backend), **made)


def of_checkpoint(method: str, scheme: str, layer: Live, **attributes: object) -> Live:
    """The same layer as an engine has it that was started from an FP8 checkpoint: its method, and what says how."""
    granularity = scheme.removeprefix("fp8_per_")
    strategy = named("QuantizationStrategy", value=granularity)
    weights = named("QuantizationArgs", strategy=strategy, block_structure=[128, 128])
    block_size = [128, 128] if granularity == "block" else None
    if method == "CompressedTensorsLinearMethod":
        kernel = layer.quant_method.fp8_linear
        layer.scheme = named("CompressedTensorsW8A8Fp8", weight_quant=weights, fp8_linear=kernel)
        layer.quant_method = named(method)
    else:
        known = {name: getattr(layer.quant_method, name, None) for name in ("fp8_linear", "fp8_backend")}
        layer.quant_method = named(method, weight_quant=weights, weight_block_size=block_size, **known)
    if method.startswith("CompressedTensors") and granularity == "block":
        for name in [name for name, _ in layer.named_parameters() if name.endswith("_scale_inv")]:
            layer.register_parameter(name.removesuffix("_inv"), layer._parameters.pop(name))
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer
