# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Where vLLM keeps each parameter of a live model: the weight as its loader sees it, and its scales.

What is allowed is a list, by class: a layer can keep the shape of its parameters and still hold them in another order
(packed, swapped or shuffled), so that shapes alone do not tell. What is not on the list is refused by name.

Nothing here imports vLLM: classes are known by their names, which stand here for 0.26 and 0.32 alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stagingd.boxes import Shape
from stagingd.errors import StagingError
from stagingd.moments import BLOCK
from stagingd_vllm.known_layers import EXPERTS_OF_CHECKPOINTS, LINEAR_OF_CHECKPOINTS, NotKnown
from stagingd_vllm.scales import Granularity
from stagingd_vllm.schemes import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, INT8_PER_CHANNEL, Scheme
from stagingd_vllm.wrapped_weights import BYTES, WRAPPING, is_wrapped, parts_of, scheme_of, wrapping_fault
from stagingd_vllm.wrapped_weights import SCALES as WRAPPED_SCALES

PLAIN = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})
"""Methods whose weights lie as the loader writes them."""

LINEAR = {
    "Fp8PerTensorOnlineLinearMethod": FP8_PER_TENSOR,
    "Fp8PtpcOnlineLinearMethod": FP8_PER_CHANNEL,
    "Fp8PerBlockOnlineLinearMethod": FP8_PER_BLOCK,
}

KERNELS = frozenset(
    {
        "CutlassFP8ScaledMMLinearKernel",
        "PerTensorTorchFP8ScaledMMLinearKernel",
        "RowWiseTorchFP8ScaledMMLinearKernel",
        "ChannelWiseTorchFP8ScaledMMLinearKernel",
        "TritonFP8ScaledMMLinearKernel",
        "CutlassFp8BlockScaledMMKernel",
        "TritonFp8BlockScaledMMKernel",
    }
)
"""Kernels that leave weight and scales as the method made them; DeepGEMM's round scales to powers of two."""

EXPERTS = {
    "Fp8PerTensorOnlineMoEMethod": FP8_PER_TENSOR,
    "Fp8PtpcOnlineMoEMethod": FP8_PER_CHANNEL,
    "Fp8PerBlockOnlineMoEMethod": FP8_PER_BLOCK,
    "Int8OnlineMoEMethod": INT8_PER_CHANNEL,
}

METHODS = (
    PLAIN
    | WRAPPING
    | LINEAR.keys()
    | LINEAR_OF_CHECKPOINTS.keys()
    | EXPERTS.keys()
    | EXPERTS_OF_CHECKPOINTS.keys()
    | {"UnquantizedFusedMoEMethod"}
)

BACKENDS = frozenset({"TRITON", "BATCHED_TRITON", "VLLM_CUTLASS"})
"""Backends of experts that keep gate before up, and neither shuffle nor pad."""

DERIVING = frozenset({"Attention", "MLAAttention"})
"""Modules that make something of weights after loading; of these it is known what (``derived.py``)."""

DERIVED = frozenset({"W_UV", "W_UK_T"})
"""Parameters that latent attention makes by itself: no loader writes them."""

SCALES = frozenset({"weight_scale", "weight_scale_inv", "input_scale"})
EXPERT_SCALES = frozenset(f"{weight}_{scale}" for weight in ("w13", "w2") for scale in (*SCALES, "scale"))


class LayoutUnknown(StagingError):
    """A live layer keeps its weights in a way that is not known."""

    code = "layout_unknown"


@dataclass(frozen=True)
class Home:
    """Where a parameter lives.

    Attributes:
        weight: the live memory, viewed in the shape that the model's loader writes.
        scheme: how it is quantized; None where it is not.
        scale: the live scales, float32: (1,) or (experts,) per tensor, (rows,) or (experts, rows) per channel,
            (rows / 128, columns / 128), with the experts before, per block; None without a scheme.
        parts: into how many parts of equal size its rows fall, each padded by itself: gate and up.
        places: the modules' attributes that weight and scale were found at; with dots, attributes of attributes.
    """

    weight: torch.Tensor
    scheme: Scheme | None = None
    scale: torch.Tensor | None = None
    parts: int = 1
    places: tuple[tuple[torch.nn.Module, str], ...] = ()

    def takes(self, shape: Shape) -> bool:
        """Whether a parameter that the loader sees in this shape fits: as it is, or padded to whole blocks."""
        live = tuple(self.weight.shape)
        if live == shape or self.scheme is not FP8_PER_BLOCK or len(live) != 3:
            return live == shape
        rows, columns = (self.parts * _padded(shape[1] // self.parts), _padded(shape[2]))
        return shape[1] % self.parts == 0 and live == (shape[0], rows, columns)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def homes(model: torch.nn.Module) -> dict[str, Home]:
    """The home of every parameter of a live model that its loader writes, by the parameter's name.

    Names of tied parameters are all there, with the same memory.

    Raises:
        LayoutUnknown: names the layer, what it is, and what is not known about it.
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, home in _homes_of(path, module):
            found[f"{path}.{attribute}" if path else attribute] = home
    return found


def _homes_of(path: str, module: torch.nn.Module) -> Iterator[tuple[str, Home]]:
    method = type(getattr(module, "quant_method", None)).__name__
    parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if type(module).__name__ in DERIVING:
        parameters = {name: parameter for name, parameter in parameters.items() if name not in DERIVED}
    if not parameters:
        _check_derived(path, module)
        return
    scheme: Scheme | None = None
    scale_names: frozenset[str] = frozenset()
    weights: tuple[str, ...] = ()
    if method in LINEAR or method in LINEAR_OF_CHECKPOINTS:
        scheme, weights, scale_names = _scheme(path, module, method), ("weight",), SCALES
        _check_kernel(path, module)
    elif method in EXPERTS or method in EXPERTS_OF_CHECKPOINTS or method == "UnquantizedFusedMoEMethod":
        scheme, weights, scale_names = _scheme(path, module, method), ("w13_weight", "w2_weight"), EXPERT_SCALES
        _check_backend(path, module)
    elif method not in PLAIN | WRAPPING and method != "NoneType":
        raise _unknown(path, module, f"quantization by {method} is not known")
    else:
        _check_derived(path, module)
    for name, parameter in parameters.items():
        if is_wrapped(parameter):
            yield name, _unwrapped(path, module, name, parameter)
            continue
        live = parameter.detach()
        if scheme is not None and name in weights:
            parts = getattr(getattr(module.quant_method, "moe", None), "w13_num_shards", 2) if "w13" in name else 1
            yield name, _quantized(path, module, name, live, scheme, parts)
        elif scheme is None or name not in scale_names:
            yield name, Home(live, places=((module, name),))


def _scheme(path: str, module: torch.nn.Module, method: str) -> Scheme | None:
    of_checkpoint = (LINEAR_OF_CHECKPOINTS | EXPERTS_OF_CHECKPOINTS).get(method)
    if of_checkpoint is None:
        return LINEAR.get(method) or EXPERTS.get(method)
    try:
        return of_checkpoint(module)
    except NotKnown as unknown:
        raise _unknown(path, module, str(unknown)) from unknown


def _check_derived(path: str, module: torch.nn.Module) -> None:
    name = type(module).__name__
    known = name in DERIVING or name in METHODS  # some methods are modules themselves; their layer is looked at
    if hasattr(module, "process_weights_after_loading") and not known:
        raise _unknown(path, module, "it makes something of its weights after loading, and it is not known what")


def _check_kernel(path: str, module: torch.nn.Module) -> None:
    # compressed-tensors keeps it in the layer's scheme.
    holder = module.quant_method if hasattr(module.quant_method, "fp8_linear") else getattr(module, "scheme", None)
    kernel = type(getattr(holder, "fp8_linear", None)).__name__
    if kernel not in KERNELS:
        raise _unknown(path, module, f"whether kernel {kernel} rearranges weights or scales is not known")


def _check_backend(path: str, module: torch.nn.Module) -> None:
    method = module.quant_method
    kinds = ("unquantized_backend", "fp8_backend", "int8_backend")
    names = [backend.name for kind in kinds if (backend := getattr(method, kind, None)) is not None]
    if not names or not BACKENDS.issuperset(names):
        raise _unknown(
            path, module, f"in which order experts' backend {names or 'of no name'} keeps weights is not known"
        )


def _quantized(path: str, module: torch.nn.Module, name: str, live: torch.Tensor, scheme: Scheme, parts: int) -> Home:
    weight = live if name != "weight" or scheme.granularity is Granularity.BLOCK else live.t()
    if live.dtype != getattr(torch, scheme.live):
        raise _unknown(path, module, f"{name} is {live.dtype} and not {scheme.live}")
    scale_name = _scale_name(module, name, scheme)
    scale: torch.Tensor | None = getattr(module, scale_name, None)
    if scale is None or scale.dtype != torch.float32:
        raise _unknown(path, module, f"{name} has no float32 scales where {scheme.name} keeps them")
    expected = _scale_shape(weight, scheme)
    scale = scale.detach()
    if scale.numel() != expected.numel() or not scale.is_contiguous():
        raise _unknown(
            path, module, f"scales of {name} are {tuple(scale.shape)} and should be {tuple(expected)} and contiguous"
        )
    return Home(weight, scheme, scale.view(expected), parts, ((module, name), (module, scale_name)))


def _unwrapped(path: str, module: torch.nn.Module, name: str, parameter: torch.Tensor) -> Home:
    fault = wrapping_fault(parameter, type(getattr(module, "quant_method", None)).__name__)
    if fault is not None:
        raise _unknown(path, module, f"{name} {fault}")
    (weight, scale), scheme = parts_of(parameter), scheme_of(parameter)
    places = (module, f"{name}.{BYTES}"), (module, f"{name}.{WRAPPED_SCALES}")
    return Home(weight, scheme, scale.view(_scale_shape(weight, scheme)), places=places)


def _scale_name(module: torch.nn.Module, name: str, scheme: Scheme) -> str:
    if scheme is INT8_PER_CHANNEL:
        return f"{name.removesuffix('_weight')}_scale"
    # That of blocks has a name of its own, but for compressed-tensors.
    inverse = f"{name}_scale_inv"
    return inverse if scheme.granularity is Granularity.BLOCK and hasattr(module, inverse) else f"{name}_scale"


def _scale_shape(weight: torch.Tensor, scheme: Scheme) -> torch.Size:
    *experts, rows, columns = weight.shape
    if scheme.granularity is Granularity.TENSOR:
        return torch.Size(experts or [1])
    if scheme.granularity is Granularity.CHANNEL:
        return torch.Size([*experts, rows])
    return torch.Size([*experts, -(-rows // BLOCK), -(-columns // BLOCK)])


def _unknown(path: str, module: torch.nn.Module, why: str) -> LayoutUnknown:
    method = getattr(module, "quant_method", None)
    how = f", {type(method).__name__}" if method is not None else ""
    return LayoutUnknown(
        f"layer {path or 'model'} ({type(module).__name__}{how}): {why}",
        remedy="use a quantization, kernel and backend that are listed in the documentation, or vLLM's own reload",
        parameter=path,
    )
