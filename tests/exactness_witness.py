# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Compares live weights that a receiver has written with those that vLLM's own loading makes, for every rank.

Run as ``python exactness_witness.py FOLDER`` it reads cases from its input, one JSON object a line, and answers each
with a line. vLLM takes many seconds to import, and so it is imported once for all of them.

vLLM's loaders, layers and online quantization are the real ones, and so are checkpoints that are FP8 already, made of
what is staged. What is replaced, since a CPU has no such kernels:

- the choice of a kernel, by the names of those on a GPU; they leave weights as they are;
- the device's capability, by one that has FP8, and what a CPU makes of plain weights, by nothing;
- the CUDA kernel that quantizes with one scale, by the same arithmetic in torch;
- the maximum over ranks, by that over the models of all ranks, one after the other in this process; TorchAO, which
  takes that of the rank's own slice, is given it too;
- the question whether the device computes in FP8.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import witness
from fp8_checkpoints import BLOCK_MODELS, CHECKPOINTS
from fp8_on_cpu import scaled_fp8_quant
from private_stage import PrivateStage, by_columns, by_rows, private_stage
from stagingd_vllm import offline
from stagingd_vllm.layouts import Home, homes
from stagingd_vllm.offline import Worker, derive_offline, worker_config
from stagingd_vllm.plan import ReadPlan, StagedTensor
from stagingd_vllm.quantized_layers import derive_quantization, quantized_parameters
from stagingd_vllm.receiver import Receiver
from stagingd_vllm.skeleton import derive_plan, loading
from tiny_models import MODELS, TinyModel
from vllm import _custom_ops
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import utils as layers_utils
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import fp8 as serialized
from vllm.model_executor.layers.quantization import torchao
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as compressed_experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w8a8_fp8 as compressed_linear,
)
from vllm.model_executor.layers.quantization.online import fp8, int8
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_processing
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.utils import replace_parameter
from vllm.utils.torch_utils import set_default_torch_dtype

from stagingd.boxes import Box, whole

CUTS = {
    "whole": lambda shape: [whole(shape)],
    "rows of 3 ranks": lambda shape: by_rows(shape, 3),
    "columns of 2 ranks": lambda shape: by_columns(shape, 2),
}


SCRAMBLED = 0x55


class Agreement:
    """The maxima over ranks that vLLM asks for while it loads: noted in a first pass, answered in a second."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.noted: dict[int, list[torch.Tensor]] = {}
        self.answers: list[torch.Tensor] | None = None
        self._rank, self._next = 0, 0

    def begin(self, rank: int) -> None:
        self._rank, self._next = rank, 0
        self.noted.setdefault(rank, [])

    def ask(self, amax: torch.Tensor, sharded: bool | int) -> torch.Tensor:
        if not sharded or (sharded == 1 and not isinstance(sharded, bool)):
            return amax
        if self.answers is None:
            self.noted[self._rank].append(amax.clone())
            return amax
        answer = self.answers[self._next]
        self._next += 1
        return answer.clone()

    def settle(self) -> None:
        self.answers = [torch.stack(asked).amax(0) for asked in zip(*self.noted.values(), strict=True)]


class Kernel:
    """One that leaves weights as they are."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def input_quant_key(self) -> None:
        return None

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: None) -> torch.Tensor:
        """Latent attention has a layer multiply by one, to learn what its weights are."""
        return (x.float() @ (layer.weight.float() * layer.weight_scale.t())).to(x.dtype)


def kernel_of_a_gpu(**options: Any) -> Kernel:
    block = options["weight_quant_key"].scale.group_shape.row == 128
    name = "CutlassFp8BlockScaledMMKernel" if block else "CutlassFP8ScaledMMLinearKernel"
    return type(name, (Kernel,), {})()


def only_replace(self: Any, layer: Any, w13: Any, w2: Any, w13_scale: Any, w2_scale: Any, *_: Any, **__: Any) -> None:
    for name, tensor in (("w13", w13), ("w2", w2)):
        replace_parameter(layer, f"{name}_weight", tensor)
    for name, tensor in (("w13", w13_scale), ("w2", w2_scale)):
        replace_parameter(layer, f"{name}_{self.weight_scale_name}", tensor)


agreement = Agreement()
torch.cpu._is_amx_tile_supported = lambda: False  # else latent attention packs what it makes of weights, for AMX
_custom_ops.scaled_fp8_quant = scaled_fp8_quant
for module in (fp8, serialized, compressed_linear):
    module.init_fp8_linear_kernel = kernel_of_a_gpu
for module in (fp8, serialized, compressed_experts):
    module.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.TRITON, None)
layers_utils.dispatch_cpu_unquantized_gemm = lambda *_, **__: None
serialized.Fp8MoEMethod._init_moe_kernel = lambda *_: None
compressed_experts.CompressedTensorsW8A8Fp8MoEMethod.get_fused_moe_quant_config = lambda *_: None
compressed_tensors.CompressedTensorsConfig._check_scheme_supported = lambda *_, **__: True
fp8._Fp8OnlineMoEBase._setup_kernel = only_replace
int8.select_int8_moe_backend = lambda **_: (Int8MoeBackend.TRITON, None)
int8.Int8OnlineMoEMethod._setup_kernel = lambda *_: None
for module in (fp8, int8):
    for name in ("amax_for_tp_weight_quant", "amax_for_moe_weight_quant"):
        if hasattr(module, name):
            setattr(module, name, agreement.ask)

TORCHAO = {"torchao_per_row": "PerRow", "torchao_per_tensor": "PerTensor"}
"""Modes of TorchAO, by the name of its granularity."""


def arguments_for(mode: str | None) -> dict[str, Any]:
    """vLLM's arguments for TorchAO beside its name: its configuration in JSON. Imported only where it is asked for."""
    if mode not in TORCHAO:
        return {}
    quantization = importlib.import_module("torchao.quantization")
    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=getattr(quantization, TORCHAO[mode])())
    written = json.dumps(importlib.import_module("torchao.core.config").config_to_dict(config))
    return {"hf_overrides": {"quantization_config_dict_json": written}}


def wrap_weights(model: torch.nn.Module) -> None:
    """What vLLM does with layers of TorchAO after loading, and the maximum over ranks that it does not ask for."""
    api, float8 = (
        importlib.import_module(f"torchao.quantization.{name}")
        for name in ("quant_api", "quantize_.workflows.float8.float8_tensor")
    )
    own, torchao._check_torchao_fp8_activation_capability = float8._choose_scale_float8, lambda _: None
    api._check_hardware_support = lambda _: None
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, torchao.TorchAOLinearMethod):
            continue
        granularity = method.quant_config.torchao_config.granularity[1]
        # Rows are whole on every rank unless columns are cut; a tensor is not, unless every rank has all of it.
        cutting = (
            RowParallelLinear if type(granularity).__name__ == "PerRow" else (ColumnParallelLinear, RowParallelLinear)
        )
        cut = isinstance(layer, cutting)
        float8._choose_scale_float8 = lambda *some, cut=cut, **named: agreement.ask(own(*some, **named), cut)
        method.process_weights_after_loading(layer)
    float8._choose_scale_float8 = own


def loaded_by_vllm(config: VllmConfig, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"), torch.no_grad():
        model = initialize_model(vllm_config=config)
        model.load_weights(iter(tensors.items()))
        if config.model_config.quantization in ("fp8", "compressed-tensors"):
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        elif isinstance(config.quant_config, torchao.TorchAOConfig):
            wrap_weights(model)
        elif config.quant_config is not None:
            finalize_layerwise_processing(model, config.model_config)
    config.compilation_config.static_forward_context.clear()
    config.compilation_config.static_all_moe_layers.clear()
    return model


def random_tensors(staged: dict[str, StagedTensor], seed: int) -> dict[str, torch.Tensor]:
    """Magnitudes differ from row to row and from tensor to tensor."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in staged.items():
        rows = torch.rand(*tensor.shape[:-1], 1, generator=generator) * 4 * torch.rand((), generator=generator)
        made[name] = (torch.randn(tensor.shape, generator=generator) * rows).to(getattr(torch, tensor.dtype))
    return made


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


def scramble(home: Home) -> None:
    home.weight.untyped_storage().fill_(SCRAMBLED)
    if home.scale is not None:
        home.scale.fill_(torch.nan)


def compare(
    model: torch.nn.Module, plan: ReadPlan, config: VllmConfig, stage: PrivateStage, version: int
) -> dict[str, Any]:
    """What differs after the receiver has written a version over scrambled weights."""
    live = homes(model)
    wanted = {
        name: (bits(home.weight), None if home.scale is None else home.scale.clone()) for name, home in live.items()
    }
    for home in live.values():
        scramble(home)
    receiver = Receiver(model, plan, stage, loading=loading(config))
    receiver.apply(stage.lease(version))
    computed = sorted(tensor.tensor for tensor in plan.computed)
    outcome: dict[str, Any] = {"bytes": 0, "scales": 0, "schemes": set(), "wrong": [], "computed": computed, "steps": 0}
    for name in (*plan.parameters, *plan.computed_parameters):
        home, (weight, scale) = live[name], wanted[name]
        found = bits(home.weight)
        padding = _padding(plan, name, home, found)
        differing = int((found != weight)[~padding].sum())
        if differing:
            outcome["wrong"].append(f"{name}: {differing} bytes")
            # Bytes of one sign count the values of FP8 in their order.
            outcome["steps"] = max(outcome["steps"], int((found.int() - weight.int())[~padding].abs().max()))
        if not (found[padding] == SCRAMBLED).all() or weight[padding].any():
            outcome["wrong"].append(f"{name}: padding")
        outcome["bytes"] += weight.numel()
        if home.scheme is not None and scale is not None and home.scale is not None:
            outcome["schemes"].add(home.scheme.name)
            outcome["scales"] += scale.numel()
            if not torch.equal(home.scale, scale):
                outcome["wrong"].append(f"{name}: {int((home.scale != scale).sum())} scales")
    return outcome | {"schemes": sorted(outcome["schemes"])}


def _padding(plan: ReadPlan, name: str, home: Home, found: torch.Tensor) -> torch.Tensor:
    """Which bytes hold no element: rows that fill up a vocabulary, and what makes experts whole blocks."""
    mask = torch.zeros_like(found, dtype=torch.bool)
    if "embed" in name or "lm_head" in name:
        mask[sum(entry.source.lengths[0] for entry in plan.entries if entry.region.parameter == name) :] = True
    elif plan.shapes[name] != tuple(home.weight.shape):
        _, rows, columns = plan.shapes[name]
        mask.unflatten(1, (home.parts, -1))[:, :, rows // home.parts :] = True
        mask[:, :, columns:] = True
    return mask


@dataclass(frozen=True)
class ToldModel:
    """A model that the question describes: what stands in its config.json, and its tensors, each (dtype, shape)."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, list[int]]]

    def save_config(self, path: Path) -> None:
        """Writes config.json."""
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(self.config))

    def staged(self) -> dict[str, StagedTensor]:
        """The tensors of its checkpoint."""
        return {name: StagedTensor(dtype, tuple(shape)) for name, (dtype, shape) in self.tensors.items()}


def examine(
    folder: Path, model: TinyModel | ToldModel, mode: str | None, ranks: int, expert: bool, cut: str, quantized: bool
) -> list[dict[str, Any]]:
    """Per rank, what differs; ``mode`` is the name of an online quantization, or of a kind of checkpoint.

    The stage holds what is ``quantized`` in the engine's format already, as far as it fits.
    """
    staged = model.staged()
    tensors = random_tensors(staged, 1)
    checkpoint = CHECKPOINTS.get(mode or "")
    loaded = tensors if checkpoint is None else dict(checkpoint.tensors(tensors))
    online = mode if checkpoint is None else None
    workers = [Worker(tensor_parallel=ranks, expert_parallel=expert, rank=rank) for rank in range(ranks)]
    offline.EngineArgs = functools.partial(EngineArgs, **arguments_for(mode))
    quantization = "torchao" if mode in TORCHAO else online
    agreement.forget()
    if ranks > 1 and online not in (None, "fp8_per_block"):  # these two ask for no maximum
        for worker in workers:
            agreement.begin(worker.rank)
            with worker_config(folder, worker, quantization=quantization) as config:
                loaded_by_vllm(config, loaded)
        agreement.settle()
    boxes: dict[str, list[Box]] = {name: CUTS[cut](tensor.shape) for name, tensor in staged.items()}
    outcomes = []
    told = derive_quantization(folder, workers[0], mode or "", staged, "cpu") if quantized else None
    with private_stage(tensors, boxes, quantization=told) as stage:
        stage.write(1, tensors)
        for worker in workers:
            agreement.begin(worker.rank)
            with worker_config(folder, worker, quantization=quantization) as config:
                live = loaded_by_vllm(config, loaded)
                # That of a live worker also holds every live parameter against the model as its loader sees it.
                derive = derive_offline if checkpoint is None else functools.partial(derive_plan, live)
                outcomes.append(compare(live, derive(config, staged, {}), config, stage, 1))
                if told is not None:
                    schemes = {name: home.scheme.name for name, home in homes(live).items() if home.scheme is not None}
                    outcomes[-1]["quantized otherwise"] = sorted(
                        {(name, scheme.name) for name, scheme in quantized_parameters(config).items()}
                        ^ set(schemes.items())
                    )
                    outcomes[-1]["copied"] = sorted(name for group in told.groups for name in group)
                if isinstance(model, ToldModel):
                    same = derive_plan(live, config, staged, {}) == derive_offline(config, staged, {})
                    outcomes[-1]["as a live worker plans"] = same
    return outcomes


def serve(folder: Path) -> None:
    def answer(case: dict[str, Any]) -> list[dict[str, Any]]:
        model = ToldModel(**case["told"]) if "told" in case else (MODELS | BLOCK_MODELS)[case["model"]]
        checkpoint = CHECKPOINTS.get(case["mode"] or "")
        path = folder / case["model"] / (case["mode"] if checkpoint else "plain")
        if not path.exists():
            (checkpoint or type(model)).save_config(model, path)
        return examine(
            path, model, case["mode"], case["ranks"], case["expert"], case["cut"], case.get("quantized", False)
        )

    witness.serve(answer)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(Path(sys.argv[1]))
