# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Compares the read plans of tiny models with what vLLM's own loaders do, for every rank of an engine.

Run as ``python plan_witness.py FOLDER`` it reads cases from its input, one JSON object a line, and answers each with
a line. vLLM takes many seconds to import, and so it is imported once for all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import witness
from stagingd_vllm.offline import NoSuchWorker, Worker, derive_offline, worker_config
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor
from tiny_models import MODELS, TinyModel
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

CANARY = -7777.0
"""Exact in bfloat16, and far from every value that is loaded."""


def filled_model(config: VllmConfig) -> torch.nn.Module:
    """The model of the current worker in memory, every parameter all canary."""
    with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
        model = initialize_model(vllm_config=config)
    for parameter in model.parameters():
        parameter.data.fill_(CANARY)
    config.compilation_config.static_forward_context.clear()
    config.compilation_config.static_all_moe_layers.clear()
    return model


def random_tensors(staged: dict[str, StagedTensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(getattr(torch, tensor.dtype))
        for name, tensor in staged.items()
    }


def apply(plan: ReadPlan, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Carries a plan out. Returns how often each element of each parameter was written."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    counts = {name: torch.zeros(p.shape, dtype=torch.int32) for name, p in parameters.items()}
    for entry in plan.entries:
        region = entry.region
        place = region.shape, region.stride, region.offset
        torch.as_strided(parameters[region.parameter], *place).copy_(tensors[entry.tensor][entry.source.slices])
        torch.as_strided(counts[region.parameter], *place).add_(1)
    return counts


def compare(loaded: torch.nn.Module, planned: torch.nn.Module, counts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What is wrong, by parameter, and the rows of each that the loader fills with zeros and the plan leaves alone."""
    wrong, padding = [], {}
    others = dict(planned.named_parameters())
    for name, parameter in loaded.named_parameters():
        written = counts[name] == 1
        bytes_of = [p.detach().contiguous().view(torch.uint8).view(*p.shape, -1) for p in (parameter, others[name])]
        same = (bytes_of[0] == bytes_of[1]).all(-1)
        zero = (parameter == 0) & (counts[name] == 0)
        if not torch.equal(written | zero, torch.ones_like(written)) or not same[written].all():
            wrong.append(name)
        if (others[name][~written] != CANARY).any():
            wrong.append(f"{name} beside the plan")
        if zero.any():
            rows = zero.flatten(1).all(1)
            padding[name] = int(rows.sum()) if torch.equal(zero, rows[:, None].expand_as(zero)) else -1
    return {"wrong": wrong, "padding": padding}


def refusals(config: VllmConfig, staged: dict[str, StagedTensor], unknown: list[str]) -> dict[str, str | None]:
    """What is said when the stage has one tensor more, for each of ``unknown``; None where it is not refused."""
    said: dict[str, str | None] = {}
    for name in unknown:
        try:
            derive_offline(config, staged | {name: StagedTensor("bfloat16", (4,))}, {})
            said[name] = None
        except PlanRefused as refused:
            said[name] = str(refused)
    return said


def examine(folder: Path, model: TinyModel, worker: Worker, unknown: list[str]) -> dict[str, Any]:
    staged = model.staged()
    tensors = random_tensors(staged)
    with worker_config(folder, worker) as config:
        loaded, planned = filled_model(config), filled_model(config)
        with torch.no_grad():
            loaded.load_weights(iter(tensors.items()))
        plan = derive_offline(config, staged, {})
        outcome = compare(loaded, planned, apply(plan, planned, tensors))
        outcome["refusals"] = refusals(config, staged, unknown)
    return outcome | {
        "computed": [tensor.tensor for tensor in plan.computed],
        "unread": plan.unread,
        "read": [[entry.tensor, *map(list, entry.source)] for entry in plan.entries],
        "casts": sorted({entry.tensor for entry in plan.entries if entry.cast}),
    }


def serve(folder: Path) -> None:
    def answer(case: dict[str, Any]) -> dict[str, Any]:
        model, path = MODELS[case["model"]], folder / case["model"]
        if not path.exists():
            model.save_config(path)
        return examine(path, model, Worker(**case["worker"]), case["unknown"])

    witness.serve(answer, NoSuchWorker)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
