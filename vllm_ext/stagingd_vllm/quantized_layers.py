# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Which parameters vLLM's online quantization would quantize, and how: asked without an engine, a kernel or a GPU.

vLLM asks its quantization's configuration about each layer as it makes it. Here that configuration notes what it would
have answered, and answers that the layer is not quantized: the methods themselves choose kernels of the machine's GPU.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from stagingd.formats import EngineDevice, Quantization
from stagingd_vllm.layouts import EXPERTS, LINEAR
from stagingd_vllm.offline import Worker, derive_offline, worker_config
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor
from stagingd_vllm.schemes import Scheme
from stagingd_vllm.skeleton import build_skeleton
from stagingd_vllm.stage_quantization import stage_quantization

REMEDY = "stage it as it is: its workers quantize it"


class _Noting(OnlineQuantizationConfig):  # type: ignore[misc]
    """Notes the class of every layer's method by the layer, and has no layer quantized."""

    def __init__(self, asked: OnlineQuantizationConfig) -> None:
        super().__init__(copy.deepcopy(asked.args))
        self.noted: list[tuple[torch.nn.Module, str]] = []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """That of a layer that is not quantized."""
        resolved = self.resolve_quant_method_cls(type(layer), prefix)
        if resolved is not None:
            self.noted.append((layer, resolved[-1].__name__))
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def quantized_parameters(config: VllmConfig) -> dict[str, Scheme]:
    """How the worker whose configuration is current would quantize each parameter, by each of the parameter's names.

    Args:
        config: what ``worker_config`` gives, inside its context, with a quantization.

    Raises:
        PlanRefused: the quantization is none of vLLM's online ones, or this vLLM does not tell, or a layer would be
            quantized in a way that is not known. Names the layer.
    """
    asked = config.quant_config
    if not isinstance(asked, OnlineQuantizationConfig) or not hasattr(asked, "resolve_quant_method_cls"):
        raise PlanRefused(
            f"which layers {type(asked).__name__} quantizes is told by live engines alone, and by vLLM's online "
            "quantization, from 0.32 on",
            remedy="give an online quantization, such as fp8_per_tensor",
        )
    noting = _Noting(asked)
    skeleton = build_skeleton(config, noting)
    methods = {id(layer): method for layer, method in noting.noted}
    schemes: dict[str, Scheme] = {}
    # Under all of its paths: some modules are held twice.
    for path, module in skeleton.named_modules(remove_duplicate=False):
        if id(module) in methods:
            schemes |= _parameters(path, methods[id(module)])
    return schemes


def _parameters(path: str, method: str) -> dict[str, Scheme]:
    if method in LINEAR:
        return {f"{path}.weight": LINEAR[method]}
    if method not in EXPERTS:
        raise PlanRefused(f"layer {path} is quantized by {method}, which is not known", remedy=REMEDY, parameter=path)
    return {f"{path}.{name}": EXPERTS[method] for name in ("w13_weight", "w2_weight")}


def derive_quantization(
    directory: Path, engine: Worker, quantization: str, staged: Mapping[str, StagedTensor], device: EngineDevice
) -> Quantization:
    """What trainers can quantize so that all workers of an engine copy it. No such configuration may be current.

    Args:
        directory: a Hugging Face model's folder; only its configuration is read.
        engine: any worker of it.
        quantization: vLLM's name of an online one.
        staged: every tensor of the stage by its Hugging Face name.
        device: on which kind of device the engine's weights are.

    Raises:
        NoSuchWorker: vLLM does not run this model, or not on an engine of this size.
        PlanRefused: the stage does not fit the model, or no stage is in the engine's format, or nothing fits in it.
    """
    plans: list[ReadPlan] = []
    schemes: dict[str, Scheme] = {}
    for rank in range(engine.ranks):
        with worker_config(directory, dataclasses.replace(engine, rank=rank), quantization=quantization) as config:
            plans.append(derive_offline(config, staged, {}))
            schemes |= quantized_parameters(config)
    return stage_quantization(plans, schemes, staged, device)
