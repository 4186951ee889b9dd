# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""FP8 checkpoints of tiny models: the configuration that says so, and the tensors, by vLLM's own online arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stagingd_vllm.plan import StagedTensor
from tiny_models import HEADS, HIDDEN, KV_HEADS, LATENT, SPARSE, TinyModel
from vllm.model_executor.layers.quantization.online import fp8
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from stagingd.boxes import Shape

PLAIN = ("embed_tokens.weight", "lm_head.weight", ".gate.weight")
"""Matrices that such checkpoints leave as they are."""

FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up", "w1": "gate_up", "w3": "gate_up"}
FUSED |= {"q_a": "qkv_a", "kv_a": "qkv_a"}
"""What the engine fuses, so that it has one scale per tensor."""


@dataclass(frozen=True)
class Checkpoint:
    """A kind of checkpoint: ``config.json`` says it by ``quantization``; its weights are what ``scheme`` makes.

    Weights that the engine fuses have one scale per tensor as the engine needs it, or by ``own`` each its own.
    """

    scheme: str
    quantization: dict[str, Any]
    own: bool = False

    @property
    def scale(self) -> str:
        """The name of a weight's scale, after the weight's own."""
        return "_scale_inv" if "weight_block_size" in self.quantization else "_scale"

    def save_config(self, model: TinyModel, path: Path) -> None:
        """Writes the model's config.json, with the quantization in it."""
        model.save_config(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": self.quantization}))

    def tensors(self, staged: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, of those that a trainer stages."""
        quantized = {name for name, tensor in staged.items() if tensor.dim() == 2 and not name.endswith(PLAIN)}
        largest: dict[str, torch.Tensor] = {}
        for name in quantized:
            amax, group = staged[name].abs().amax().float(), self._group(name)
            largest[group] = torch.maximum(largest.get(group, amax), amax)
        for name, tensor in staged.items():
            if name not in quantized:
                yield name, tensor
                continue
            weight, scale = self._quantized(tensor, largest[self._group(name)])
            yield name, weight
            yield name + self.scale, scale

    def _group(self, name: str) -> str:
        return name if self.own else _fused(name)

    def _quantized(self, weight: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.scheme == "fp8_per_block":
            made: tuple[torch.Tensor, torch.Tensor] = per_block_cast_to_fp8(
                weight, block_size=[128, 128], use_ue8m0=False
            )
            return made
        if self.scheme == "fp8_per_channel":
            scale = fp8._fp8_channel_scale(weight.abs().amax(-1, keepdim=True))
            return fp8._fp8_quant_per_channel(weight, scale), scale
        scale = fp8._fp8_scale(largest.reshape(1))
        return fp8.ops.scaled_fp8_quant(weight, scale=scale)[0], scale


def _fused(name: str) -> str:
    *path, module, _ = name.split(".")
    part = module.partition("_proj")[0]
    return ".".join([*path, FUSED.get(part, part)])


def _compressed(strategy: str, **options: Any) -> dict[str, Any]:
    quantized = {"num_bits": 8, "type": "float", "symmetric": True}
    activations = {"strategy": "group", "group_size": 128} if strategy == "block" else {"strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": quantized | {"strategy": strategy, "dynamic": False} | options,
                "input_activations": quantized | activations | {"dynamic": True},
            }
        },
    }


def _fp8(**options: Any) -> dict[str, Any]:
    ignored = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))]
    ignored += [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)]
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ignored,
        **options,
    }


CHECKPOINTS = {
    "compressed-tensors per channel": Checkpoint("fp8_per_channel", _compressed("channel")),
    "compressed-tensors per tensor": Checkpoint("fp8_per_tensor", _compressed("tensor")),
    "compressed-tensors in blocks": Checkpoint("fp8_per_block", _compressed("block", block_structure=[128, 128])),
    "fp8 per tensor": Checkpoint("fp8_per_tensor", _fp8()),
    "fp8 per tensor, scales of their own": Checkpoint("fp8_per_tensor", _fp8(), own=True),
    "fp8 in blocks": Checkpoint("fp8_per_block", _fp8(weight_block_size=[128, 128])),
}

HEAD, WIDTH = 128, 512
BLOCKS_OF_LATENT = LATENT | {
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}


@dataclass(frozen=True)
class BlockModel(TinyModel):
    """One whose tensors two ranks cut at blocks of 128: vLLM takes such a checkpoint's blocks as they are."""

    def staged(self) -> dict[str, StagedTensor]:
        """The tensors of its checkpoint, as a trainer stages them."""
        return {name: self._resized(name, tensor) for name, tensor in super().staged().items()}

    def _resized(self, name: str, tensor: StagedTensor) -> StagedTensor:
        if "experts" in name:
            return tensor
        part = name.removesuffix(".weight").rpartition(".")[2]
        latent = "q_lora_rank" in self.options
        nope, rope, value, rank = 64, 64, 64, 128
        sizes: dict[str, Shape] = {
            "q_proj": (HEADS * HEAD, HIDDEN),
            "k_proj": (KV_HEADS * HEAD, HIDDEN),
            "v_proj": (KV_HEADS * HEAD, HIDDEN),
            "o_proj": (HIDDEN, HEADS * (value if latent else HEAD)),
            "q_norm": (HEAD,),
            "k_norm": (HEAD,),
            "gate_proj": (WIDTH, HIDDEN),
            "up_proj": (WIDTH, HIDDEN),
            "down_proj": (HIDDEN, WIDTH),
            "q_a_proj": (rank, HIDDEN),
            "q_a_layernorm": (rank,),
            "q_b_proj": (HEADS * (nope + rope), rank),
            "kv_a_proj_with_mqa": (rank + rope, HIDDEN),
            "kv_a_layernorm": (rank,),
            "kv_b_proj": (HEADS * (nope + value), rank),
        }
        return StagedTensor(tensor.dtype, sizes.get(part, tensor.shape))


_SIZES = {"head_dim": HEAD, "intermediate_size": WIDTH}
BLOCK_MODELS = {
    "llama, in blocks": BlockModel("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "qwen3-moe, in blocks": BlockModel("Qwen3MoeConfig", "Qwen3MoeForCausalLM", SPARSE | _SIZES),
    "deepseek-v3, in blocks": BlockModel(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", BLOCKS_OF_LATENT | {"intermediate_size": WIDTH}
    ),
}
