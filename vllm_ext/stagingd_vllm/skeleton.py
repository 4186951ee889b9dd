# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The plan of a live vLLM worker, traced on a second copy of its model that has no memory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import expert_map_manager
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from stagingd.boxes import Shape
from stagingd_vllm.computed import Loading, attributes, check_alone
from stagingd_vllm.layouts import Home, homes
from stagingd_vllm.pipeline import on_other_stages
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor, make_plan, plan_with_aliases
from stagingd_vllm.tracing import LoadWeights, trace_loader

_CONSTRUCTOR_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def derive_plan(
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    staged: Mapping[str, StagedTensor],
    staged_aliases: Mapping[str, str],
) -> ReadPlan:
    """The read plan of this worker for a stage.

    Call it in the worker, after the model was loaded. The live model is looked at and never written.

    Args:
        model: the worker's live model.
        vllm_config: the configuration that it was made from.
        staged: every tensor of the stage by its Hugging Face name.
        staged_aliases: further names of these tensors, each with the tensor's own.

    Raises:
        PlanRefused: the stage does not fit the model, or the model is of a kind that is not understood.
        LayoutUnknown: the live model keeps a parameter in a way that is not known.
    """
    live = homes(model)
    return plan_with_aliases(lambda names: _derive(live, vllm_config, staged, names), staged_aliases)


def _derive(
    live: Mapping[str, Home],
    vllm_config: VllmConfig,
    staged: Mapping[str, StagedTensor],
    staged_aliases: Mapping[str, str],
) -> ReadPlan:
    skeleton = build_skeleton(vllm_config)
    owners = _owners(live, dict(skeleton.named_parameters(remove_duplicate=False)))
    return plan_of_skeleton(skeleton, owners, staged, staged_aliases)


def plan_of_skeleton(
    skeleton: torch.nn.Module,
    owners: Mapping[str, str],
    staged: Mapping[str, StagedTensor],
    staged_aliases: Mapping[str, str],
) -> ReadPlan:
    """The read plan that follows from what a model's own loader does on the meta device.

    Tensors that it computes with are set apart, where it does the same with them in every version and alone.

    Args:
        skeleton: what ``build_skeleton`` gives, new.
        owners: for every parameter of it, the one under whose name the plan has to know it.
        staged: every tensor of the stage by its Hugging Face name.
        staged_aliases: the further names that the loader is given, each with the tensor's own.

    Raises:
        PlanRefused: the stage does not fit the model, or its loader is of a kind that is not understood.
    """
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    before = attributes(skeleton)
    writes = trace_loader(cast(LoadWeights, skeleton.load_weights), staged, parameters, staged_aliases)
    # Under the owner's name: parameters that vLLM tied after loading are apart in the skeleton, and two tensors
    # that claim the one live region are then noticed.
    owned = [dataclasses.replace(write, parameter=owners[write.parameter]) for write in writes]
    shapes: dict[str, Shape] = {name: tuple(p.shape) for name, p in parameters.items() if owners[name] == name}
    aliases = {name: owner for name, owner in owners.items() if name != owner}
    plan = make_plan(owned, staged, shapes, aliases, on_other_stages(skeleton, staged), allow_computed=True)
    plan = dataclasses.replace(plan, aliases=staged_aliases)
    if plan.computed:
        check_alone(skeleton, plan, writes, owners, staged, before)
    return plan


def loading(vllm_config: VllmConfig) -> Loading:
    """How vLLM loads this worker's model: what it computes while it loads is then the same."""

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(vllm_config.model_config.dtype):
            yield

    return Loading(lambda: build_skeleton(vllm_config), around)


def build_skeleton(vllm_config: VllmConfig, quant_config: QuantizationConfig | None = None) -> torch.nn.Module:
    """The same model for the same rank on the meta device, in the layout that its loader expects.

    Args:
        vllm_config: of a live model, or of one that could be.
        quant_config: is asked how each layer is quantized; it has to answer that none is.

    Raises:
        PlanRefused: the model's constructor needs memory.
    """
    config = copy.copy(vllm_config)
    config.model_config = copy.deepcopy(vllm_config.model_config)
    config.quant_config = quant_config
    # Layers register themselves here by name. A shared one would find every name taken, and a deep copy would
    # copy the live layers with their caches.
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config.compilation_config.mode = CompilationMode.NONE
    with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"), _expert_maps_in_memory():
        try:
            skeleton: torch.nn.Module = initialize_model(vllm_config=config)
        except _CONSTRUCTOR_ERRORS as error:
            raise PlanRefused(
                f"the model cannot be built without memory: {type(error).__name__}: {error}",
                remedy="its constructor computes with weights; load this model with vLLM's own loader",
            ) from error
    return skeleton


@contextlib.contextmanager
def _expert_maps_in_memory() -> Iterator[None]:
    """Lets the constructor and the weight loaders of layers with experts look up which of them are local.

    The table is a tensor, made on the default device and read element by element: it has to have its memory.
    """
    determine = expert_map_manager.determine_expert_map

    def in_memory(*args: object, **kwargs: object) -> object:
        with torch.device("cpu"):
            return determine(*args, **kwargs)

    expert_map_manager.determine_expert_map = in_memory
    try:
        yield
    finally:
        expert_map_manager.determine_expert_map = determine


def _owners(live: Mapping[str, Home], skeleton: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For every parameter, the first one with the same memory in the live model: itself, unless it is tied.

    Raises:
        PlanRefused: live model and skeleton differ in a parameter's name, shape or dtype, or the skeleton ties what
            the live model does not.
    """
    for name in sorted(live.keys() ^ skeleton.keys()):
        raise _differs(name, "is in only one of them")
    first: dict[tuple[object, ...], str] = {}
    owners = {
        name: first.setdefault((home.weight.data_ptr(), home.weight.shape, home.weight.stride()), name)
        for name, home in live.items()
    }
    tied: dict[int, str] = {}
    for name, parameter in skeleton.items():
        weight = live[name].weight
        if not live[name].takes(tuple(parameter.shape)):
            raise _differs(name, f"should have shape {tuple(parameter.shape)} and has {tuple(weight.shape)}")
        if live[name].scheme is None and weight.dtype != parameter.dtype:
            raise _differs(name, f"should be {parameter.dtype} and is {weight.dtype}")
        partner = tied.setdefault(id(parameter), name)
        if owners[name] != owners[partner]:
            raise _differs(name, f"should share its memory with {partner}")
    return owners


def _differs(name: str, how: str) -> PlanRefused:
    return PlanRefused(
        f"parameter {name} of the live model is not as the model's loader expects it: it {how}",
        remedy="the engine repacked or wrapped it after loading; such layers cannot be written in place",
        parameter=name,
    )
